"""Commands in hostile environments: each works, or says in one line why not, and leaves nothing behind.

    hostile.py   families of environments, each drawn in many variants: what is set, mounted, limited
    commands.py  what is run there: every subcommand, and short runs of those that start processes
    draw.py      which pairs a seed gives, and the sample that every test run takes
    pair.py      runs one pair in a process and a folder of its own
    launch.py    starts a command in a spoiled environment, and finds what it leaves
    judge.py     what is wrong with what was seen

`python -m tests.environments` runs 1,000 pairs; `--only K` repeats one.
"""
