"""What methods are and cost, in tables: the pages in ``docs/`` are written here."""
