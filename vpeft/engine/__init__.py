"""One training loop for all tasks, and what goes around it.

``train.py``, ``test.py``, ``predict.py``, ``table.py`` and ``pretrain.py`` hold the function of their name, which the
command of that name calls. ``config.py`` reads configurations, ``loop.py`` is the loop, and the others are its parts:
``checks.py`` (what is refused first), ``setup.py`` (optimiser, schedule, loaders), ``start.py`` (frozen weights, ``init``),
``state.py`` (what a killed run continues from), ``plan.py`` (what is done with a run's folder), ``settings.py`` (which
settings may differ), ``run.py`` and ``lock.py`` (the folder), ``trouble.py`` (how a run ends that
cannot go on),
``progress.py`` and ``report.py`` (what people see), ``cache.py`` (stored features).

Nothing is imported here, since the functions would hide the modules, and the loop's libraries are large.
"""

__all__: list[str] = []
