"""The report: one page, the same in Markdown and JSON, of one run or several."""
