//! Go's flag package takes long flags with one dash; so do exporters, and
//! so do we.

use std::ffi::OsString;

use clap::CommandFactory;

/// Gives known long flags written with one dash their second one:
/// `-web.listen-address=:1` becomes `--web.listen-address=:1`. Everything
/// else, and everything after `--`, stays as it is.
pub fn normalize(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let command = super::Cli::command();
    let commands = std::iter::once(&command).chain(command.get_subcommands());
    let flags = commands.flat_map(|command| command.get_arguments());
    let mut known: Vec<&str> = flags.filter_map(|flag| flag.get_long()).collect();
    known.push("help");
    let mut literal = false;
    let normalize = |word: OsString| {
        literal |= word == "--";
        let name = word
            .to_str()
            .and_then(|word| word.strip_prefix('-')?.split('=').next());
        match name {
            Some(name) if !literal && known.contains(&name) => {
                let mut normal = OsString::from("-");
                normal.push(word);
                normal
            }
            _ => word,
        }
    };
    words.into_iter().map(normalize).collect()
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
