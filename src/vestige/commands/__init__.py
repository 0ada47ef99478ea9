"""The verbs of the ``vestige`` command, one module each.

A module here whose name does not begin with an underscore is a verb: ``retain.py`` is ``vestige retain``. Its
docstring is the help, and the docstring's first line stands in ``vestige --help``. It defines ``run``, whose
annotated parameters typer turns into arguments and options; where all have defaults, the defaults are plain
values, so that ``run()`` is the verb without arguments. It imports only typer at its head and what it works
with inside ``run``, and the work itself is a function of the library. A verb that can go on where it was
interrupted says how in a constant, ``RESUME``. What goes wrong is raised as :class:`vestige.errors.VestigeError`;
``raise typer.Exit(1)`` ends work that was done and found wanting.
"""
