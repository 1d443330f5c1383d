"""`make report`."""

from report.page import main

main()
