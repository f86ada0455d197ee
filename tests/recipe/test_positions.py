"""Lines and columns of keys, however TOML lets them be written."""

import pytest

from quantune.recipe.positions import locate

TEXT = '''\
# r = 1 in a comment
[adapter]
r = 8
"quoted key" = 1
targets = [
    "q_proj",
    "v_proj",
]
note = """
r = 3
"""

[training]
optimizer.name = "adamw"
inline = { r = 1, seed = 2 }

[[data.train]]
path = "a"

[[data.train]]
path = "b"   # path
  indented = 1
'''


@pytest.mark.parametrize(
    ("path", "position"),
    [
        (("adapter",), (2, 2)),
        (("adapter", "r"), (3, 1)),
        (("adapter", "quoted key"), (4, 1)),
        (("adapter", "targets"), (5, 1)),
        (("adapter", "targets", 1), (5, 1)),
        (("adapter", "note"), (9, 1)),
        (("training", "optimizer", "name"), (14, 11)),
        (("training", "inline", "seed"), (15, 19)),
        (("data", "train", 0, "path"), (18, 1)),
        (("data", "train", 1, "path"), (21, 1)),
        (("data", "train", 1, "indented"), (22, 3)),
        (("nothing",), None),
    ],
)
def test_the_key_is_found(path, position):
    assert locate(TEXT, path) == position
