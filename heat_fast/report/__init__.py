"""A result as people look at it outside a terminal: a page, a notebook's cell, figures.

- :mod:`heat_fast.report.page`: one self-contained HTML file, and the compact view of a notebook;
- :mod:`heat_fast.report.plots`: matplotlib figures (the optional extra ``plot``);
- :mod:`heat_fast.report.palette`: the colours they share.

The usual way in is the result itself: ``result.to_html(path)``, ``result.plot()``,
``result.plot_targets()``, or a result at the end of a notebook's cell.
"""
