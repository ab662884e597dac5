"""Final answers to mathematics problems: where they stand, how they are spelled and read, when two are the same."""
