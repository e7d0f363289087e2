//! `man`: the manual's pages, one behind the other or as the files that a package installs.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;

use super::output::results;
use crate::cli::{Cli, ManArgs};
use crate::compat::{OldName, flags};

/// Runs the verb.
pub(super) fn run(args: &ManArgs) -> anyhow::Result<ExitCode> {
    let mut command = Cli::command();
    command.build();
    match &args.dir {
        Some(dir) => files(command, dir)?,
        None => pages(command).try_for_each(|page| page.render(&mut results()))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The page of a command and, behind it, those of its subcommands, to which it refers by name.
fn pages(command: clap::Command) -> Box<dyn Iterator<Item = clap_mangen::Man>> {
    let children: Vec<_> = command.get_subcommands().cloned().collect();
    let shown = |child: &clap::Command| !child.is_hide_set() && child.get_name() != "help";
    let below = children.into_iter().filter(shown).flat_map(pages);
    Box::new(std::iter::once(clap_mangen::Man::new(command)).chain(below))
}

fn files(command: clap::Command, dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut count = 0;
    for page in pages(command) {
        let mut text = Vec::new();
        page.render(&mut text)?;
        write(dir, &page.get_filename(), &text)?;
        count += 1;
    }
    for name in OldName::ALL {
        let text = flags::page(name);
        write(dir, &format!("{}.1", name.name()), text.as_bytes())?;
        count += 1;
    }
    writeln!(results(), "{}: {count} pages", dir.display())?;
    Ok(())
}

fn write(dir: &Path, file: &str, text: &[u8]) -> anyhow::Result<()> {
    let path = dir.join(file);
    fs::write(&path, text)
        .map_err(|error: io::Error| anyhow::Error::from(error))
        .with_context(|| format!("cannot write {}", path.display()))
}
