"""The pages that are written from the registry and from the configuration's dataclasses."""
