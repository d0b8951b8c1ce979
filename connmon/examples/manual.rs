//! Writes the man pages and the shell completions from the command line's
//! own definition: `cargo run --example manual -- DIRECTORY` makes
//! `DIRECTORY/man` and `DIRECTORY/completions`.
//!
//! An example, so that neither the agent nor xtask carries the generators.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory as _;
use clap_complete::Shell;

/// Completions that Debian's packages put where the shells look for them.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Fish, Shell::Zsh];

fn main() -> anyhow::Result<()> {
    let directory = std::env::args_os()
        .nth(1)
        .context("name the directory to write to")?;
    let directory = Path::new(&directory);
    let (man, completions) = (directory.join("man"), directory.join("completions"));
    for place in [&man, &completions] {
        std::fs::create_dir_all(place)
            .with_context(|| format!("cannot make {}", place.display()))?;
    }
    let mut command = connmon::cli::Cli::command();
    clap_mangen::generate_to(command.clone(), &man)
        .with_context(|| format!("cannot write to {}", man.display()))?;
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut command, "connmon", &completions)
            .with_context(|| format!("cannot write to {}", completions.display()))?;
    }
    Ok(())
}
