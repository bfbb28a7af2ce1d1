"""Hand-drawn 12 x 12 shapes of all objects, as arrays of palette indices.

A sheet holds blocks of shapes side by side: a line of names, then 12 lines of cells. Letters: ``.`` is empty, ``#`` the
outline, ``d`` ``m`` ``l`` ``w`` the dark, middle, light and highlight shade of the object's colour. Every other letter
is a fixed colour of ``SECONDARY``.
"""

import numpy as np

SHAPE_SIZE = 12

RAMP_LETTERS = "#dmlw"

SECONDARY: dict[str, tuple[int, int, int]] = {
    "k": (28, 24, 36),  # eyes, wheels, feelers
    "W": (248, 248, 240),  # spots, pearls, pages
    "b": (134, 86, 48),  # wood
    "B": (94, 58, 34),  # wood in shadow
    "y": (236, 194, 72),  # gold, glow
    "Y": (176, 128, 44),  # gold in shadow
    "s": (164, 172, 186),  # steel
    "S": (110, 118, 136),  # steel in shadow
    "g": (92, 158, 66),  # leaf
    "G": (54, 106, 48),  # leaf in shadow
    "c": (178, 224, 238),  # glass
    "r": (226, 84, 40),  # flame, ruby
    "p": (240, 220, 182),  # cream, skin, belly
    "P": (204, 174, 132),  # cream in shadow
}

LETTERS = "." + RAMP_LETTERS + "".join(SECONDARY)

#: Shapes that are also drawn mirrored. Symmetric ones gain nothing from it; tools and buildings keep one orientation.
MIRRORED = frozenset({"bird", "cat", "dragon", "fish", "snail"})

_SHEET = """
apple        bird         boat         book         butterfly    cactus       car
.....##.##.. ...####..... .....##..... .##########. ...k....k... ....####.... ............
.....#b#gG#. ..#wllm#.... ....#bl#.... #dwlllmmmmm# .##.k..k.##. ...#wlmd#... ............
..###bb#G#.. .#lWklmm#... ...#wbll#... #dll######m# #lm##kk##md# ...#wlmd#.#. ...#######..
.#lll##mmm#. yylkkmmm#... ...#wbllm#.. #dll#yyyy#m# #wlm#kk#mmd# .#.#lmmd##m# ..#wcc#ccl#.
#lwwlmmmmmd# .#llmmmm##.. ..#wlbllm#.. #dll#yyyY#m# #lWlmkkmWmd# #l##wlmd##d# .#lccc#cccm#
#lwlmmmmmmd# .#pplm#mm##. ..#llb#llm#. #dll######m# #llWmkkWmmd# #l##wlmdmmd# #########mm#
#llmmmmmmmd# .#pplm#mmmd# .#llmb##mmm# #dllmmmmmmm# .#lmmkkmmd#. #lmmlmmddd#. #wlllllmmmm#
#lmmmmmmmmd# .#ppmmm#mmd# ######b##### #dllmmmmmmd# ..###kk###.. .#mmwlmd##.. #ymmmmmmmmr#
#lmmmmmmmdd# ..#ppmmm##d# #wllllmmmmm# #dlmmmmmmdd# .#lm#kk#md#. ..##wlmd#... #d####mm###d
.#mmmmmmdd#. ...#######.# #lmmmmmmmmd# #d########## .#lWmkkmWd#. ...#lmmd#... .#kkkk##kkk#
..#dmmddd#.. ....y..y.... .#dmmmmmdd#. #dWWWWWWWWp# .#mm#kk#dd#. ...#wlmd#... .#kSSk##kSk#
...######... ...yy.yy.... ..########.. .########### ..##.##.##.. ..########.. ..####..###.
cat          crown        cup          dragon       fish         flower       gem
.#....#..... ............ ............ ..#.#....... ............ ....####.... ............
#m#..#m#.... ##...##...## .######..... .#y#y#..###. ....####.... .##.#wl#.##. ..########..
#mm##mm#.... #W#.#WW#.#W# #bbbbBB#.... #llmm#.#pdd# ....#lmd#... #lm##lm##md# .#wwllmmmd#.
#lmmmmd#..#. #l#.#WW#.#d# ########.... #kmmm##pddd# ..#######.## #llmyyyymmd# #wwllmmmmdd#
#kmmkmd#.#m# #ll##lm##md# #wlmmmd####. lllmm#pddd#. .#llllmm##m# .##lyYYyd##. #dddddddddd#
#lmppmd#.#m# #wll#lm#mmd# #wlmmmd#mmm# #####m#dd#.. #wWkllmmmmd# #llmyyyymmd# #wldllmmdmd#
.#mWWm#..#d# #wllllmmmmd# #wlmmmd###m# ...#lm#d#..# #lkkmmmdmm#. #lm##md##md# .#wldlmdmd#.
.#lmmmd##md# #lmrmccmrmd# #llmmmd#.#d# ..#llmm##.#m #mlmmmdmmmd# .##.#md#.##. ..#wllmmd#..
#lmWWmmdmd#. #lmrmccmrmd# #llmmmd###d# ..#ppmmm##m# .#mmmmmd##d# ....####.##. ...#lmmd#...
#lmWWmmddd#. ############ #lmmmdd#ddd# ..#ppmmmmm#. ..##dd##..## .##.#gG##gG# ....#md#....
#lmmdmmdd#.. #wllmmmmmdd# #lmmddd####. ..#pmm#mm#.. ....#d#..... #gg##gG#gG#. .....##.....
.#########.. ############ .######..... ..########.. .....#...... .###ggGG##.. ............
ghost        guitar       hat          heart        house        key          lantern
....####.... ....#BB#.... ......###... ............ .......####. ....####.... ....####....
..##wllm##.. ...y#bb#y... .....#lm##.. ..###..###.. ....####sS#. ...#llmm#... ...#....#...
.#wwllmmmd#. ....#bb#.... ....#llmd#.. .#lll##mmm#. ...#lmmdsS#. ..#lw##md#.. ..########..
.#wllmmmmd#. ....#bb#.... ....#lmm#... #lwwlmmmmmd# ..#lmmmmdS#. ..#l#..#d#.. .#wllmmmmd#.
#wlkkmmkkmd# ...##bb##... ...#wlmmd#.. #lwlmmmmmmd# .#lmmmmmmd#. ..#lm##md#.. ..########..
#llkkmmkkmd# ..#lmbbmd#.. ...#wlmmd#.. #llmmmmmmmd# #lmmmmmmmmd# ...#lmmd#... ..#lmyymd#..
#llmmmmmmmd# ..#wlbbmd#.. ..#wlmmmmd#. #lmmmmmmmdd# ############ ....#lm#.... ..#lmyymd#..
#lmmmkkmmmd# ...#lkkd#... ..#yyyyyyY#. .#mmmmmmdd#. .#dmm####d#. ....#lm###.. ..#lmWWmd#..
#lmmmmmmmmd# ..#llkkmd#.. .##yyyyyyY## ..#mmmmdd#.. .#dccmkppd#. ....#lmmd#.. ..#lmyymd#..
#lmmmmmmmdd# .#wllmmmmd#. #llmmmmmmmd# ...#mmdd#... .#dccmkpyd#. ....#lm##... .##########.
#lm##md##md# .#llmbbmdd#. #mmmmmmmddd# ....#dd#.... .#dmmmkppd#. ....#lmmmd#. #wllmmmmmdd#
.##..##..##. ..########.. .##########. .....##..... .##########. ....#######. ############
mushroom     potion       rocket       shield       snail        star         sword
....####.... ....#bb#.... .....##..... ############ ............ .....##..... .........###
..##llmm##.. ....#bB#.... ....#lm#.... #lllmssmmmm# .....#####.. ....#lm#.... ........#ll#
.#lWWlmmmd#. ...######... ...#wlmd#... #lwlmssmmmd# k.k.#llmmm#. ....#lm#.... .......#wlm#
.#lWWmmWWd#. ....#cc#.... ...#wlmd#... #lwlmssmmmd# k.k#lwlllmd# #####lm##### ......#wlmd#
#llmmmmWWmd# ....#cc#.... ..#wlccmd#.. #ssssssssss# ####lw##lmd# #wwlllmmmmd# .##..#wlmd#.
#lmmWWmmmmd# ...#cccc#... ..#wlccmd#.. #SSSSSSSSSS# #pp#l#mm#md# .#wllmmmmd#. .#y##wlmd#..
#mmmWWmmmdd# ..#wmmmmm#.. ..#wlmmmd#.. #llmmssmmdd# #kp#lm#m#md# ..#llmmmd#.. .#yywlmd#...
.##########. .#wlmmlmmd#. .##llmmmd##. #lmmmssmmdd# #pp#mmm#mmd# ..#lmmmmd#.. ..#yylm#....
...#pppP#... .#llmmmmmd#. #m#llmmmd#d# .#mmmssmdd#. #pppp#mmmd#. .#lmmmmmmd#. ..#yyyy#....
...#pppP#... .#lmmlmmdd#. #d##lmmd##d# ..#mmssdd#.. .#ppppp####. .#lmd##dmd#. .#bB#yyy#...
...#ppPP#... ..#mmmmdd#.. ###.yrry.### ...##ss##... .#pPPPPPPPP# #md##..##dd# #bB#.####...
....####.... ...######... .....yy..... .....##..... ..#########. ###......### ###.........
tree         umbrella
.....##..... .....##.....
....#lm#.... ...##lm##...
...#lmmd#... ..#wllmmd#..
..#lmmmmd#.. .#wllmmmmd#.
...#lmmd#... #wllmdmmdmd#
..#lwmmmd#.. #llmmdmmdmd#
.#lwmmmmmd#. #l##mmmm##d#
..#llmmmd#.. ##..#bB#..##
.#lmmmdmmd#. .....bB.....
#llmmmmmmdd# .....bB.bb..
.####bB####. .....bB.bB..
....#bB#.... ......bbB...
"""

#: Objects that the bundled model is never trained on, for teaching it something new.
_UNSEEN_SHEET = """
anchor       robot
....####.... ....y..y....
...#lwmd#... ....k..k....
...#l##d#... ..########..
..###lm####. ..#wlmmmd#..
.#wllmmmddd# ..#lcmcmd#..
..###lm####. ..#lmkkmd#..
....#lm#.... .##########.
.#..#lm#..#. #l#lssSmd#d#
#l#.#lm#.#d# #m#lsSSmd#d#
#ll##lm##md# ##.#lmmd#.##
.#llmmmmmd#. ...#l##d#...
..########.. ..##k..k##..
"""


def _read_sheet(sheet: str) -> dict[str, np.ndarray]:
    """Return the shapes of a sheet by name, each (12, 12) uint8 of positions in ``LETTERS``."""
    lines = [line.split() for line in sheet.strip().splitlines()]
    shapes = {}
    for first in range(0, len(lines), SHAPE_SIZE + 1):
        names, *rows = lines[first : first + SHAPE_SIZE + 1]
        for name, columns in zip(names, zip(*rows, strict=True), strict=True):
            shapes[name] = np.array([[LETTERS.index(letter) for letter in row] for row in columns], np.uint8)
            shapes[name].flags.writeable = False
    return shapes


SHAPES: dict[str, np.ndarray] = _read_sheet(_SHEET)
UNSEEN_SHAPES: dict[str, np.ndarray] = _read_sheet(_UNSEEN_SHEET)
