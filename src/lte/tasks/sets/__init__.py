"""The data sets, a file for each kind; `lte.tasks.registry` finds the `TASKS` of every file here."""
