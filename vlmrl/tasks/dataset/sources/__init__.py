"""Where the rows of `task=dataset` come from: one file per format, and the layout of folders and repositories.

task.path ──opening.open_rows──▶ local path ──┐
                                 hub id ──hub─┴─▶ repository: config, split ──▶ files ──reader──▶ Rows
"""
