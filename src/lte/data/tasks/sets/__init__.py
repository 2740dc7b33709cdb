"""The data sets, a file for each kind; `lte.data.tasks.registry` finds the `TASKS` of every file here."""
