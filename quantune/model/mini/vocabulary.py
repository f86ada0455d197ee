"""Word lists and number spelling that the generated part of the corpus draws from."""


def listed(text: str) -> list[str]:
    """Split a readable line of words into a list."""
    return text.split()


MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
          "December")  # fmt: skip
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

ONES = listed("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen")  # fmt: skip
TENS = listed("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
IRREGULAR_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
                      "nine": "ninth", "twelve": "twelfth"}  # fmt: skip

WOMEN = listed("Anna Maria Clara Sofia Emma Julia Laura Nora Alice Ruth Grace Helen Ida Lena Mia Olga Paula Rosa Sara "
         "Vera Zoe Amina Leila Yuki Mei Priya")  # fmt: skip
MEN = listed("Tom Ben Max Oscar Peter Paul David Simon Jack Henry Leo Felix Hugo Ivan Karl Lucas Martin Noah Otto "
       "Robert Samuel Victor Omar Kenji Ravi Daniel")  # fmt: skip
NAMES = WOMEN + MEN
CITIES = listed("Oslo Paris London Berlin Madrid Rome Vienna Lisbon Dublin Prague Warsaw Athens Cairo Tokyo Delhi Lima "
          "Boston Chicago Toronto Sydney Nairobi Seoul Helsinki Geneva")  # fmt: skip
CAPITALS = {"France": "Paris", "Norway": "Oslo", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome",
            "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin", "Poland": "Warsaw", "Greece": "Athens",
            "Egypt": "Cairo", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Finland": "Helsinki"}  # fmt: skip

GROUPS = {
    "animal": listed("dog cat horse cow sheep goat fox bear wolf mouse rabbit duck goose owl eagle fish frog bee"),
    "fruit": listed("apple pear plum cherry lemon orange banana grape peach mango fig melon"),
    "colour": listed("red blue green yellow black white brown purple pink grey"),
    "tool": listed("hammer saw drill knife spade ladder rope brush wrench needle"),
    "vehicle": listed("car bus train boat ship bicycle truck tram plane wagon"),
    "food": listed("bread cheese soup rice honey butter cake salad egg potato"),
}  # fmt: skip
COLOURS = GROUPS["colour"]
NOUNS = [word for name, words in GROUPS.items() if name != "colour" for word in words] + listed(
    "book letter lamp table chair door window garden river bridge house road hill stone box key clock map coin bag "
    "hat coat shoe cup plate bottle paper picture song story market school kitchen forest lake field tower island "
    "harbour station office library museum village mountain valley cloud star moon fire")  # fmt: skip
PLACES = listed("garden river market school kitchen forest lake tower harbour station office library museum village "
          "mountain bridge park farm")  # fmt: skip
ADJECTIVES = listed("small large old new quiet loud bright dark warm cold heavy light clean dirty quick slow soft hard "
              "long short round strange simple")  # fmt: skip
VERBS = {"walk": "walked", "look": "looked", "open": "opened", "close": "closed", "carry": "carried", "find": "found",
         "take": "took", "bring": "brought", "buy": "bought", "sell": "sold", "make": "made", "see": "saw",
         "hear": "heard", "write": "wrote", "read": "read", "paint": "painted", "clean": "cleaned", "give": "gave",
         "keep": "kept", "lose": "lost", "wash": "washed", "move": "moved", "draw": "drew", "hold": "held"}  # fmt: skip
OPPOSITES = {"hot": "cold", "big": "small", "old": "new", "fast": "slow", "light": "dark", "high": "low",
             "long": "short", "open": "closed", "early": "late", "full": "empty", "hard": "soft", "wet": "dry",
             "loud": "quiet", "clean": "dirty", "rich": "poor", "left": "right", "first": "last", "up": "down",
             "before": "after", "yes": "no", "strong": "weak", "young": "old", "thick": "thin"}  # fmt: skip
HAPPY = ("wonderful", "lovely", "excellent", "great", "delightful", "charming", "perfect", "pleasant")
UNHAPPY = ("terrible", "awful", "boring", "horrible", "disappointing", "dreadful", "bad", "sad")
FIELDS = ("name", "city", "colour", "item", "price", "count", "size", "code", "owner", "title", "weight", "score",
          "status", "level", "kind", "place", "unit", "label", "pet", "job")  # fmt: skip
UNITS = {"hour": ("minute", 60), "minute": ("second", 60), "day": ("hour", 24), "week": ("day", 7),
         "year": ("month", 12), "metre": ("centimetre", 100), "kilometre": ("metre", 1000),
         "kilogram": ("gram", 1000), "litre": ("millilitre", 1000), "dozen": ("piece", 12)}  # fmt: skip
SYMBOLS = {"hour": "h", "minute": "min", "second": "s", "metre": "m", "kilometre": "km", "kilogram": "kg",
           "gram": "g", "litre": "l", "day": "d", "week": "w"}  # fmt: skip


def in_words(number: int) -> str:
    """Spell 0..9999 in English: 42 -> "forty-two", 105 -> "one hundred and five"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    head, rest = divmod(number, unit)
    joint = " and " if rest < 100 else " "
    return f"{ONES[head]} {name}" + (joint + in_words(rest) if rest else "")


def ordinal_word(number: int) -> str:
    """Spell an ordinal from 1 to 99: 21 -> "twenty-first"."""
    head, dash, last = in_words(number).rpartition("-")
    if last in IRREGULAR_ORDINALS:
        return head + dash + IRREGULAR_ORDINALS[last]
    return head + dash + (last[:-1] + "ieth" if last.endswith("y") else last + "th")


def ordinal_digits(number: int) -> str:
    """Write an ordinal with digits: 3 -> "3rd", 12 -> "12th"."""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


def plural(noun: str, count: int = 2) -> str:
    """Return the noun in the form that goes with `count`."""
    if count == 1 or noun in ("sheep", "fish"):
        return noun
    if noun in ("mouse", "goose", "knife"):
        return {"mouse": "mice", "goose": "geese", "knife": "knives"}[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "es" if noun == "potato" else noun + "s"


def article(phrase: str) -> str:
    """Prefix the phrase with "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def clock_12h(hour: int, minute: int) -> str:
    """Write a time of day on the 12-hour clock: (17, 5) -> "5:05 pm", (17, 0) -> "5 pm"."""
    head = str(hour % 12 or 12) + (f":{minute:02d}" if minute else "")
    return f"{head} {'pm' if hour >= 12 else 'am'}"
