"""Tables of the model cards keep their columns."""

from mediphi.markdown import table


def test_a_bar_in_a_cell_ends_no_cell() -> None:
    assert table(("a", "b"), [("runs/x|y", 3)]) == "| a | b |\n| --- | --- |\n| runs/x\\|y | 3 |\n"
