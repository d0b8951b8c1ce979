//! Man page and completions name every flag and every command: what `cargo
//! run --example manual` writes is made from the same definition.

use clap::CommandFactory as _;
use connmon::cli::Cli;
use connmon::config::{key, settings};

#[test]
fn the_man_page_names_every_flag_and_command() {
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command())
        .render(&mut page)
        .unwrap();
    // roff escapes hyphens.
    let page = String::from_utf8(page).unwrap().replace("\\-", "-");
    for setting in settings() {
        let flag = format!("--{}", key(setting));
        assert!(page.contains(&flag), "{flag}");
    }
    for command in Cli::command().get_subcommands() {
        let name = format!("connmon-{}(1)", command.get_name());
        assert!(page.contains(&name), "{name}");
    }
}

#[test]
fn completions_name_every_flag() {
    for shell in [
        clap_complete::Shell::Bash,
        clap_complete::Shell::Fish,
        clap_complete::Shell::Zsh,
    ] {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "connmon", &mut script);
        let script = String::from_utf8(script).unwrap();
        for setting in settings() {
            let key = key(setting);
            assert!(script.contains(key), "{shell}: {key}");
        }
    }
}
