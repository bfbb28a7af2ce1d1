"""Hand-drawn 12x12 shapes that the embedded model is never trained on: for teaching it something new."""

UNSEEN = {
    "anchor": """
        ....####....
        ...#lwmd#...
        ...#l##d#...
        ..###lm####.
        .#wllmmmddd#
        ..###lm####.
        ....#lm#....
        .#..#lm#..#.
        #l#.#lm#.#d#
        #ll##lm##md#
        .#llmmmmmd#.
        ..########..""",
    "robot": """
        ....y..y....
        ....k..k....
        ..########..
        ..#wlmmmd#..
        ..#lcmcmd#..
        ..#lmkkmd#..
        .##########.
        #l#lssSmd#d#
        #m#lsSSmd#d#
        ##.#lmmd#.##
        ...#l##d#...
        ..##k..k##..""",
}
