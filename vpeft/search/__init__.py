"""Search for architectures of adapters: ``driver.py`` is ``vpeft search``, ``table.py`` runs it under several seeds.

``evolution.py`` and ``budget.py`` know spaces and no model. ``config.py`` reads configurations and makes the experiments of
the stages, ``apart.py`` keeps the test split out, ``scoring.py`` scores candidates, ``journal.py`` writes them down,
``folder.py`` is the search's folder, ``plots.py`` its pictures.

Nothing is imported here, since the loop's libraries are large.
"""

__all__: list[str] = []
