"""What a test leaves beside its numbers: tables, pictures and a page.

``record.py`` keeps what is needed of each sample while the test split passes by, once; ``tables.py`` and ``pictures.py``
write it down, ``page.py`` makes one HTML file of it. The engine calls these; no task is named here.
"""
