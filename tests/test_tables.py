"""Tables of measurements, as text and as HTML."""

import pytest

from sdlearn.explore.tables import Table

TABLE = Table(["sampler", "steps", "share"], [["euler", 5, 0.5], ["dpm++ <2M>", 20, None]], {"share": ".0%"}, "Right")


def test_text_is_aligned_by_kind():
    assert str(TABLE) == ("Right\n"
                          "sampler     steps  share\n"
                          "euler           5    50%\n"
                          "dpm++ <2M>     20")


def test_html_escapes_and_aligns():
    html = TABLE._repr_html_()
    assert "<caption>Right</caption>" in html
    assert '<td style="text-align: left">dpm++ &lt;2M&gt;</td><td style="text-align: right">20</td>' in html
    assert html.count("<tr>") == 3


def test_truth_values_are_text():
    assert Table(["equal"], [[True]]).texts() == [["True"]]
    assert not Table(["equal"], [[True]]).is_numeric(0)


@pytest.mark.parametrize("rows, formats, message", [
    ([["euler"]], {}, "1 cells for 2 columns"), ([["euler", 5]], {"step": "d"}, "there is no column step"),
])
def test_rows_and_formats_fit_the_columns(rows, formats, message):
    with pytest.raises(ValueError, match=message):
        Table(["sampler", "steps"], rows, formats)
