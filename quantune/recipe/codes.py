"""The stable codes of recipe problems and what each one means."""

from __future__ import annotations

CODES = {
    "QT001": "The recipe can't be read.",
    "QT002": "The recipe is not valid TOML.",
    "QT003": "A --set override can't be understood.",
    "QT010": "A required key is missing.",
    "QT011": "A section is unknown.",
    "QT012": "A key is unknown.",
    "QT013": "A value has the wrong type.",
    "QT014": "A value is out of range.",
    "QT015": "A backend is unknown or can't be used.",
    "QT016": "An option does not fit the backend's other options.",
    "QT020": "Two keys say different things about the same matter.",
    "QT021": "A key has no meaning beside another one.",
    "QT022": "Something was asked for that needs another key.",
    "QT030": "A file that the recipe names does not exist or can't be used.",
    "QT040": "A spelling is deprecated; it is understood as the warning says.",
    "QT180": "A value of the base's config.json can't be replaced.",
    "QT200": "A YAML can't be read.",
    "QT201": "A YAML has a key twice.",
    "QT204": "A YAML lacks what a recipe needs.",
    "QT205": "A YAML belongs to a tool whose configs aren't translated yet.",
}
