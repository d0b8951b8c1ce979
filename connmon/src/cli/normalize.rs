//! Go's flag package takes long flags with one dash; so do exporters, and
//! so do we.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::CommandFactory;

/// Gives known long flags written with one dash their second one:
/// `-web.listen-address=:1` becomes `--web.listen-address=:1`. Everything
/// else, and everything after `--`, stays as it is.
pub fn normalize(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let known = long_flags();
    let mut literal = false;
    words
        .into_iter()
        .map(|word| {
            literal |= word == "--";
            if literal || !is_one_dash_flag(word.as_bytes(), &known) {
                return word;
            }
            let mut bytes = b"-".to_vec();
            bytes.extend_from_slice(word.as_bytes());
            OsString::from_vec(bytes)
        })
        .collect()
}

fn is_one_dash_flag(word: &[u8], known: &[String]) -> bool {
    let Some(name) = word.strip_prefix(b"-") else {
        return false;
    };
    let end = name.iter().position(|b| *b == b'=').unwrap_or(name.len());
    end > 1 && known.iter().any(|flag| flag.as_bytes() == &name[..end])
}

/// Long flags of every command.
fn long_flags() -> Vec<String> {
    let command = super::Cli::command();
    let mut flags: Vec<String> = std::iter::once(&command)
        .chain(command.get_subcommands())
        .flat_map(|command| command.get_arguments())
        .filter_map(|arg| arg.get_long().map(str::to_owned))
        .collect();
    flags.push("help".to_owned());
    flags.sort();
    flags.dedup();
    flags
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_long_flags_gain_a_dash() {
        let words = [
            "connmon",
            "-web.max-requests=1",
            "-version",
            "-help",
            "-o",
            "json",
            "-output=json",
            "-banana",
            "-",
            "-h",
            "--source",
            "--",
            "-source",
        ];
        let normal = [
            "connmon",
            "--web.max-requests=1",
            "--version",
            "--help",
            "-o",
            "json",
            "--output=json",
            "-banana",
            "-",
            "-h",
            "--source",
            "--",
            "-source",
        ];
        assert_eq!(
            normalize(words.map(OsString::from)),
            normal.map(OsString::from)
        );
    }
}
