"""The parts of the report page: template, styles, script."""
