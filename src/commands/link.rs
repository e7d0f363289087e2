//! `link`: makes the names under which the old flags are understood.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::output::results;
use crate::cli::LinkArgs;
use crate::compat::OldName;

/// Runs the verb.
pub(super) fn run(args: &LinkArgs) -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let own = program
        .parent()
        .context("this program is in no directory")?;
    let dir = args.dir.as_deref().unwrap_or(own);
    let dir = dir
        .canonicalize()
        .with_context(|| format!("cannot use the directory {}", dir.display()))?;
    let to = if dir == own {
        PathBuf::from(program.file_name().unwrap_or_default())
    } else {
        program.clone()
    };
    // look at all of them before the first is made
    let links = OldName::ALL.map(|name| dir.join(name.name()));
    let mut missing = Vec::new();
    for link in &links {
        match occupant(link, &program)? {
            Occupant::None => missing.push(link),
            Occupant::Ours => writeln!(results(), "{}: unchanged", link.display())?,
            Occupant::Other(what) => bail!(
                "{} is there and is {what}: nothing was changed; remove it or its package, or name another directory \
                 with --dir",
                link.display()
            ),
        }
    }
    for link in missing {
        symlink(&to, link).with_context(|| format!("cannot make the link {}", link.display()))?;
        writeln!(
            results(),
            "{}: made, leads to {}",
            link.display(),
            to.display()
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What has a link's name.
enum Occupant {
    None,
    /// A link to this program.
    Ours,
    Other(String),
}

fn occupant(link: &Path, program: &Path) -> anyhow::Result<Occupant> {
    let metadata = match fs::symlink_metadata(link) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Occupant::None),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot look at {}", link.display()));
        }
    };
    if !metadata.is_symlink() {
        return Ok(Occupant::Other("not a link".to_owned()));
    }
    let to = fs::read_link(link).with_context(|| format!("cannot read {}", link.display()))?;
    match link.canonicalize() {
        Ok(found) if found == program => Ok(Occupant::Ours),
        _ => Ok(Occupant::Other(format!("a link to {}", to.display()))),
    }
}
