"""What the commands print: tables of processes and hosts, the page of `cluster top`, what to type next.

May import `cluster.operate` and below, for the types of what it shows. Answers and STATUS in, text out; pure
except for the terminal's width.
"""
