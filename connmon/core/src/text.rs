//! Text from outside (process names, configuration files, metadata of
//! databases) before it is shown anywhere, and label values.

use std::fmt::Display;

/// Whether a character must not reach a terminal, a label or a log line:
/// control characters, line separators, and invisible characters, which may
/// change the direction of visible ones (Unicode's
/// `Default_Ignorable_Code_Point`, and interlinear annotations).
pub fn is_unprintable(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}'
                | '\u{34f}'
                | '\u{61c}'
                | '\u{115f}'..='\u{1160}'
                | '\u{17b4}'..='\u{17b5}'
                | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{3164}'
                | '\u{fe00}'..='\u{fe0f}'
                | '\u{feff}'
                | '\u{ffa0}'
                | '\u{fff0}'..='\u{fffb}'
                | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

/// The text with U+FFFD in place of every unprintable character.
pub fn printable(text: impl Display) -> String {
    text.to_string().replace(is_unprintable, "\u{fffd}")
}

/// A process name from the kernel's `comm`, which any process can set to any
/// bytes. `None` when it is empty.
pub fn process_name(comm: &[u8; 16]) -> Option<String> {
    let name = comm_bytes(comm);
    (!name.is_empty()).then(|| printable(String::from_utf8_lossy(name)))
}

/// The bytes of a `comm` before its NUL.
pub fn comm_bytes(comm: &[u8; 16]) -> &[u8] {
    let end = comm.iter().position(|&byte| byte == 0);
    &comm[..end.unwrap_or(comm.len())]
}

/// Makes an enum whose variants are all values of a label.
macro_rules! label_values {
    ($(#[$doc:meta])* $name:ident: $count:literal {
        $($(#[$value_doc:meta])* $value:ident = $label:literal,)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$value_doc])* $value,)*
        }

        impl $name {
            /// Every value, in index order.
            pub const ALL: [Self; $count] = [$(Self::$value),*];

            /// Label value.
            pub fn label(self) -> &'static str {
                [$($label),*][self as usize]
            }
        }
    };
}
pub(crate) use label_values;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unprintable_characters_are_replaced() {
        for hostile in [
            // C0, DEL, C1.
            '\0',
            '\n',
            '\r',
            '\t',
            '\u{1b}',
            '\u{7f}',
            '\u{85}',
            '\u{9b}',
            // Separators and directions.
            '\u{2028}',
            '\u{2029}',
            '\u{61c}',
            '\u{200e}',
            '\u{200f}',
            '\u{202a}',
            '\u{202e}',
            '\u{2066}',
            '\u{2069}',
            // Without a width.
            '\u{ad}',
            '\u{34f}',
            '\u{200b}',
            '\u{200d}',
            '\u{2060}',
            '\u{206f}',
            '\u{feff}',
            // Fillers, variation selectors, annotations, tags.
            '\u{115f}',
            '\u{17b5}',
            '\u{180e}',
            '\u{3164}',
            '\u{fe0f}',
            '\u{ffa0}',
            '\u{fffa}',
            '\u{1d173}',
            '\u{e0001}',
            '\u{e0041}',
            '\u{e01ef}',
        ] {
            assert!(is_unprintable(hostile), "{hostile:?}");
            assert_eq!(printable(format!("a{hostile}b")), "a\u{fffd}b");
        }
    }

    #[test]
    fn what_can_be_read_stays() {
        let text = "kworker/0:1 \"é\\\" <b> {x=1} 日本 العربية עברית Ελλάδα 🦀 \u{fffd}\u{301}";
        assert_eq!(printable(text), text);
    }

    #[test]
    fn process_names_are_printable_or_none() {
        let comm = |name: &[u8]| {
            let mut comm = [0; 16];
            comm[..name.len()].copy_from_slice(name);
            comm
        };
        for (name, shown) in [
            (&b"nginx"[..], Some("nginx")),
            (b"a\0b", Some("a")),
            (b"\xff\n\"\x1b[", Some("\u{fffd}\u{fffd}\"\u{fffd}[")),
            ("a\u{202e}b\u{200b}".as_bytes(), Some("a\u{fffd}b\u{fffd}")),
            ("\u{feff}é\u{61c}".as_bytes(), Some("\u{fffd}é\u{fffd}")),
            (&[b'x'; 16], Some("xxxxxxxxxxxxxxxx")),
            (b"", None),
        ] {
            assert_eq!(process_name(&comm(name)).as_deref(), shown, "{name:?}");
        }
    }
}
