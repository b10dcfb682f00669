//! Aligned columns.

use super::report::plain;

/// On which side a column is filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Lines of aligned columns under their headings. Cells are made safe for a terminal; nothing is cut, so that every
/// value can be copied from the screen.
pub(super) fn render<const N: usize>(columns: [(&str, Align); N], rows: &[[String; N]]) -> String {
    let heading = columns.map(|(title, _)| title.to_owned());
    let rows: Vec<[String; N]> =
        rows.iter().map(|row| row.each_ref().map(|cell| plain(cell).replace('\n', " "))).collect();
    let mut widths = [0; N];
    for row in std::iter::once(&heading).chain(&rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&heading).chain(&rows) {
        let mut line = String::new();
        for ((cell, width), (_, align)) in row.iter().zip(widths).zip(&columns) {
            match align {
                Align::Left => line.push_str(&format!("{cell:<width$}  ")),
                Align::Right => line.push_str(&format!("{cell:>width$}  ")),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_end_without_blanks() {
        let rows =
            [["a".to_owned(), "1".to_owned(), "x".to_owned()], ["bäb".to_owned(), "100".to_owned(), String::new()]];
        let text = render([("NAME", Align::Left), ("N", Align::Right), ("REST", Align::Left)], &rows);
        assert_eq!(text, "NAME    N  REST\na       1  x\nbäb   100\n");
    }

    #[test]
    fn a_cell_cannot_speak_to_the_terminal() {
        let text = render([("NAME", Align::Left)], &[["\u{1b}[31mred\nline".to_owned()]]);
        assert_eq!(text, "NAME\n\u{fffd}[31mred line\n");
    }
}
