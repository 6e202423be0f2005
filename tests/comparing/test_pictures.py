"""Pictures of comparisons, where a notebook shows them."""

from IPython.core.formatters import DisplayFormatter

from lightning_sparse_cl.comparing import plots


def test_a_notebook_shows_a_picture_that_pyplot_does_not_know():
    before = plots.pyplot().get_fignums()
    made, (axes, _) = plots.figure(1, 2)
    plots.draw_matrix([[1.0, None], [0.5, 0.25]], axes)
    shown, _ = DisplayFormatter().format(made)
    assert shown["image/png"].startswith(b"\x89PNG") and plots.pyplot().get_fignums() == before
