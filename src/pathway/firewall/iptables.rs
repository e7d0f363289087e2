//! The driver for iptables and ip6tables, of either variant (nf_tables, legacy).
//!
//! Reads with `iptables-save -t mangle`, writes one `iptables-restore --noflush` transaction. The
//! `iptables` crate tells which binary is there and what it can; its own listing and testing of rules
//! takes failure for absence, so no decision is made from them.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::model::Family;
use crate::pathway::piece::{Chain, Program, Step};

use super::{Ruleset, residue};

/// How many seconds iptables may wait for another run of it (`/run/xtables.lock`).
const LOCK_SECONDS: u64 = 5;

/// How long one run may take in all.
const RUN_LIMIT: Duration = Duration::from_secs(LOCK_SECONDS + 10);

/// Where the programs are on systems that keep them out of a user's PATH.
const SBIN: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Why the firewall could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No binary of that name.
    #[error("{program} is not installed: the CONNMARK rules need it (package iptables)")]
    Missing {
        /// The name.
        program: &'static str,
    },
    /// It could not be started or talked to.
    #[error("cannot run {program}")]
    Run {
        /// The name.
        program: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{program} failed ({status}): {said}")]
    Failed {
        /// The name.
        program: String,
        /// How it ended.
        status: String,
        /// What it said, and the line that it stopped at.
        said: String,
    },
    /// nf_tables could not be asked.
    #[error("cannot read the {family} mangle table of nf_tables")]
    Tables {
        /// The family.
        family: Family,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Which kernel interface a binary uses. Both can hold rules at once, and both then work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Nft,
    Legacy,
}

/// One binary.
#[derive(Debug, Clone)]
pub struct Tool {
    family: Family,
    program: Program,
    variant: Variant,
    has_wait: bool,
}

fn base(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

/// A program of this name in PATH, else in the sbin directories.
fn search(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let here = std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file());
    here.or_else(|| {
        // only where PATH has no iptables at all, or a test of what PATH offers would look past it
        SBIN.iter()
            .map(|dir| Path::new(dir).join(name))
            .find(|file| file.is_file() && !path_has_iptables())
    })
}

fn path_has_iptables() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["iptables", "iptables-nft", "iptables-legacy"];
    std::env::split_paths(&path).any(|dir| names.iter().any(|name| dir.join(name).is_file()))
}

/// The binaries of a family, the one that `iptables` means first, then the other variant's.
///
/// # Errors
/// [`Error::Missing`] without any.
pub fn tools(family: Family) -> Result<Vec<Tool>, Error> {
    let name = base(family);
    let mut tools = Vec::new();
    let v6 = family == Family::V6;
    if let Some((found, version)) = iptables::new(v6).ok().and_then(|found| {
        let version = found.execute("mangle", "--version").ok()?.stdout;
        Some((found, version))
    }) {
        tools.push(Tool {
            family,
            program: Program(Arc::from(found.cmd)),
            variant: variant(&version),
            has_wait: found.has_wait,
        });
    } else if let Some(path) = search(name) {
        let output = Command::new(&path).arg("--version").output();
        let output = output.map_err(|source| Error::Run {
            program: path.display().to_string(),
            source,
        })?;
        tools.push(Tool {
            family,
            program: Program(Arc::from(path.to_string_lossy())),
            variant: variant(&output.stdout),
            has_wait: true,
        });
    }
    for (other, suffix) in [(Variant::Nft, "-nft"), (Variant::Legacy, "-legacy")] {
        let name = format!("{name}{suffix}");
        let known = tools.iter().any(|tool| tool.variant == other);
        if let Some(path) = (!known).then(|| search(&name)).flatten() {
            let in_path = path_has_iptables();
            tools.push(Tool {
                family,
                program: Program(if in_path {
                    Arc::from(name)
                } else {
                    Arc::from(path.to_string_lossy())
                }),
                variant: other,
                has_wait: true,
            });
        }
    }
    if tools.is_empty() {
        return Err(Error::Missing { program: name });
    }
    Ok(tools)
}

/// `iptables v1.8.9 (nf_tables)`; before 1.8 there was only legacy, and no word for it.
fn variant(version: &[u8]) -> Variant {
    if String::from_utf8_lossy(version).contains("nf_tables") {
        Variant::Nft
    } else {
        Variant::Legacy
    }
}

/// Reads the mangle tables of a family; the first is the one to write to. That is where lines of ours
/// stand already, else the one of the plain binary, unless only the other holds rules.
///
/// # Errors
/// See [`Error`].
pub async fn read(tools: &[Tool]) -> Result<Vec<Ruleset>, Error> {
    let mut rulesets = Vec::new();
    for (number, tool) in tools.iter().enumerate() {
        rulesets.push(tool.read(number == 0).await?);
    }
    let chosen = rulesets
        .iter()
        .position(Ruleset::has_ours)
        .or_else(|| rulesets.iter().position(|ruleset| !ruleset.is_empty()))
        .unwrap_or(0);
    rulesets.swap(0, chosen);
    Ok(rulesets)
}

impl Tool {
    /// Its name, as in messages and commands.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Whether the kernel tells of changes that are made with it.
    pub fn tells(&self) -> bool {
        self.variant == Variant::Nft
    }

    /// Reads the mangle table, if there is one. `plain` is the variant that `iptables` means.
    async fn read(&self, plain: bool) -> Result<Ruleset, Error> {
        let mut ruleset = Ruleset::empty(self.family, self.program.clone());
        match self.variant {
            Variant::Nft => {
                let family = self.family;
                let absent =
                    residue::absent(family).map_err(|source| Error::Tables { family, source })?;
                ruleset.absent = absent;
                if ruleset.absent.table {
                    return Ok(ruleset);
                }
            }
            // asking legacy for a table makes the table, for as long as the namespace lives
            Variant::Legacy => {
                let names = match self.family {
                    Family::V4 => "/proc/thread-self/net/ip_tables_names",
                    Family::V6 => "/proc/thread-self/net/ip6_tables_names",
                };
                match std::fs::read_to_string(names) {
                    Ok(names) if names.lines().any(|name| name == "mangle") => {}
                    Ok(_) => return Ok(ruleset),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ruleset),
                    // CAP_NET_ADMIN alone (a relay under systemd) may ask for the table, but not for
                    // its name: the file is root's. Only the variant in use is worth making a table.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                        if !plain {
                            return Ok(ruleset);
                        }
                    }
                    Err(source) => {
                        return Err(Error::Run {
                            program: names.to_owned(),
                            source,
                        });
                    }
                }
            }
        }
        let save = self
            .run("-save", &["-t".into(), "mangle".into()], "")
            .await?;
        let absent = std::mem::take(&mut ruleset.absent);
        ruleset = Ruleset::parse(self.family, self.program.clone(), &save);
        ruleset.absent = absent;
        Ok(ruleset)
    }

    /// Makes all of these line steps in one transaction: all or none.
    ///
    /// # Errors
    /// See [`Error`]; then nothing was changed.
    pub async fn write(&self, steps: &[Step]) -> Result<(), Error> {
        let mut input = String::from("*mangle\n");
        for step in steps {
            match step {
                Step::InsertLine(line) => input.push_str(&format!(
                    "-I {} {} {}\n",
                    line.chain.name(),
                    line.position,
                    line.words
                )),
                Step::DelLine(line) => {
                    input.push_str(&format!("-D {} {}\n", line.chain.name(), line.words));
                }
                _ => {}
            }
        }
        input.push_str("COMMIT\n");
        let mut args = vec!["--noflush".to_owned()];
        if self.has_wait {
            args.extend(["--wait".to_owned(), LOCK_SECONDS.to_string()]);
        }
        self.run("-restore", &args, &input).await.map(|_| ())
    }

    async fn run(&self, verb: &str, args: &[String], input: &str) -> Result<String, Error> {
        let program = format!("{}{verb}", self.program);
        let failed = |source| Error::Run {
            program: program.clone(),
            source,
        };
        let mut child = tokio::process::Command::new(&program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take();
        let run = async {
            if let Some(mut stdin) = stdin {
                match stdin.write_all(input.as_bytes()).await {
                    // it stopped reading: its exit status says why
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                    written => written?,
                }
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(RUN_LIMIT, run)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(failed)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Failed {
            program,
            status: output.status.to_string(),
            said: explain(&String::from_utf8_lossy(&output.stderr), input),
        })
    }
}

/// What the program said in one line, with the line of the input that it names.
fn explain(said: &str, input: &str) -> String {
    let lines = said.lines().map(str::trim);
    let mut text = lines
        .filter(|line| !line.is_empty() && !line.starts_with("# Warning"))
        .collect::<Vec<_>>()
        .join("; ");
    let number = said
        .split_once("line ")
        .and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next())
        .and_then(|number| number.parse::<usize>().ok());
    if let Some(line) = number.and_then(|number| input.lines().nth(number.checked_sub(1)?)) {
        text.push_str(&format!(" (at '{line}')"));
    }
    text
}

/// Deletes a base chain that the first line of ours had made, if it is empty now.
///
/// # Errors
/// When nf_tables refuses for another reason than that it is in use.
pub fn drop_chain(family: Family, chain: Chain) -> Result<bool, Error> {
    residue::drop_chain(family, chain).map_err(|source| Error::Tables { family, source })
}

/// Deletes the mangle table that the first line of ours had made, if it is empty now.
///
/// # Errors
/// As [`drop_chain`].
pub fn drop_table(family: Family) -> Result<bool, Error> {
    residue::drop_table(family).map_err(|source| Error::Tables { family, source })
}
