"""A run, or several side by side, as one page that needs nothing but a browser; reads run folders, knows no torch."""

from lisa_kernels.report.page import write_page
from lisa_kernels.report.pictures import PICTURE_FILE
from lisa_kernels.report.record import HISTORY_FILE, PAGE_FILE, Run, read_lines, read_run

__all__ = ["HISTORY_FILE", "PAGE_FILE", "PICTURE_FILE", "Run", "read_lines", "read_run", "write_page"]
