"""The commands of ``vpeft``, a few in each module.

Each function adds a command's arguments to a parser and returns what runs it. What a command needs is imported when it runs.
"""
