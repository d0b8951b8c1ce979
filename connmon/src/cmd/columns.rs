//! Tables on a terminal, aligned by display width: 日 takes two columns of the
//! terminal, a combining mark none.

use unicode_width::UnicodeWidthStr as _;

/// One column of a table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    heading: &'static str,
    /// Least width; a longer cell moves the rest of its line.
    width: usize,
    align_right: bool,
}

/// A column of words.
pub const fn left(heading: &'static str, width: usize) -> Column {
    Column {
        heading,
        width,
        align_right: false,
    }
}

/// A column of numbers.
pub const fn right(heading: &'static str, width: usize) -> Column {
    Column {
        heading,
        width,
        align_right: true,
    }
}

/// The first line of a table.
pub fn heading(columns: &[Column]) -> String {
    row(columns, columns.iter().map(|column| column.heading))
}

/// One line of a table, no line feed.
pub fn row(columns: &[Column], cells: impl IntoIterator<Item: AsRef<str>>) -> String {
    let mut line = String::with_capacity(160);
    for (index, (column, cell)) in columns.iter().zip(cells).enumerate() {
        let cell = cell.as_ref();
        let padding = column.width.saturating_sub(cell.width());
        if index > 0 {
            line.push(' ');
        }
        if column.align_right {
            line.extend(std::iter::repeat_n(' ', padding));
            line.push_str(cell);
        } else {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', padding));
        }
    }
    line
}

/// The start of `text` that fits into so many columns of the terminal.
pub fn fit(text: &str, columns: usize) -> &str {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    let end = ends
        .take_while(|&end| text[..end].width() <= columns)
        .last();
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [left("NAME", 6), right("COUNT", 5), left("LAST", 0)];

    /// Where the last column begins on the terminal.
    fn last_begins(line: &str) -> usize {
        line.rsplit_once(' ').unwrap().0.width()
    }

    #[test]
    fn columns_line_up_whatever_the_script() {
        assert_eq!(heading(&COLUMNS), "NAME   COUNT LAST");
        for name in ["curl", "日本語", "e\u{301}te\u{301}", "ｗｉｄ", "한글", "-"] {
            let line = row(&COLUMNS, [name, "12", "end"]);
            assert_eq!(last_begins(&line), 12, "{line}");
        }
        // What is too long is not cut.
        assert_eq!(
            row(&COLUMNS, ["systemd", "123456", "x"]),
            "systemd 123456 x"
        );
    }

    #[test]
    fn a_line_is_cut_by_its_width() {
        for (text, columns, kept) in [
            ("abc", 2, "ab"),
            ("abc", 3, "abc"),
            ("abc", 0, ""),
            ("日本語", 5, "日本"),
            ("日本語", 1, ""),
            // A mark stays with its letter.
            ("e\u{301}te\u{301}", 1, "e\u{301}"),
            ("e\u{301}te\u{301}", 3, "e\u{301}te\u{301}"),
        ] {
            assert_eq!(fit(text, columns), kept, "{text} {columns}");
        }
    }
}
