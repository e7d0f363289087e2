//! The driver for iptables and ip6tables, of either variant (nf_tables, legacy).
//!
//! Reads with `iptables-save -t mangle`, writes one `iptables-restore --noflush` transaction. The
//! `iptables` crate tells which binary is there and what it can; its own listing and testing of rules
//! takes failure for absence, so no decision is made from them.

use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use crate::model::Family;
use crate::pathway::piece::{Program, Step};

use super::ruleset::Ruleset;
use super::{Driver, Error, program, residue};

/// The binaries that are installed, by family.
#[derive(Debug)]
pub(crate) struct Iptables(Vec<(Family, Vec<Tool>)>);

impl Iptables {
    /// Looks for them.
    ///
    /// # Errors
    /// When one is there and does not run.
    pub(crate) fn open(families: &[Family]) -> Result<Self, Error> {
        let mut tools = Vec::new();
        for &family in families {
            tools.push((family, self::tools(family)?));
        }
        Ok(Self(tools))
    }

    /// Whether there is one for this family.
    ///
    /// # Errors
    /// [`Error::Missing`]
    pub(crate) fn require(&self, family: Family) -> Result<(), Error> {
        let here = |(of, tools): &(Family, Vec<Tool>)| *of == family && !tools.is_empty();
        if self.0.iter().any(here) {
            return Ok(());
        }
        Err(Error::Missing {
            program: base(family),
            package: "iptables",
        })
    }

    /// Whether lines of ours are, or would be, in a table of legacy's: the kernel tells of no change there.
    /// `writes` is whether lines are written with iptables at all.
    pub(crate) fn is_silent(&self, found: &[Ruleset], writes: bool) -> bool {
        let tools = self.0.iter().flat_map(|(_, tools)| tools);
        let mut legacy = tools.filter(|tool| tool.variant == Variant::Legacy);
        legacy.any(|tool| {
            let of_family = || found.iter().filter(|one| one.family == tool.family);
            let written = of_family().next().filter(|_| writes);
            let ours = of_family().filter(|one| one.has_ours());
            ours.chain(written).any(|one| one.program == tool.program)
        })
    }
}

impl Driver for Iptables {
    type Found = Vec<Ruleset>;

    /// The mangle tables; the first of a family is the one to write to. That is where lines of ours
    /// stand already, else the one of the plain binary, unless only the other holds rules.
    async fn read(&self) -> Result<Vec<Ruleset>, Error> {
        let mut all = Vec::new();
        for (_, tools) in &self.0 {
            let mut rulesets = Vec::new();
            for (number, tool) in tools.iter().enumerate() {
                rulesets.push(tool.read(number == 0).await?);
            }
            let chosen = rulesets
                .iter()
                .position(Ruleset::has_ours)
                .or_else(|| rulesets.iter().position(|ruleset| !ruleset.is_empty()))
                .unwrap_or(0);
            if chosen > 0 {
                rulesets.swap(0, chosen);
            }
            all.extend(rulesets);
        }
        Ok(all)
    }

    /// One transaction of one program.
    async fn write(&self, steps: &[Step]) -> Result<(), Error> {
        let Some(Step::InsertLine(line) | Step::DelLine(line)) = steps.first() else {
            return Ok(());
        };
        let mut tools = self.0.iter().flat_map(|(_, tools)| tools);
        match tools.find(|tool| tool.program == line.program) {
            Some(tool) => tool.write(steps).await,
            None => Ok(()),
        }
    }
}

/// Which kernel interface a binary uses. Both can hold rules at once, and both then work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Nft,
    Legacy,
}

/// One binary.
#[derive(Debug, Clone)]
struct Tool {
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
    // elsewhere only where PATH has no iptables at all, or a test of what PATH offers would look past it
    let elsewhere = || program::in_sbin(name).filter(|_| !path_has_iptables());
    program::in_path(name).or_else(elsewhere)
}

fn path_has_iptables() -> bool {
    let names = ["iptables", "iptables-nft", "iptables-legacy"];
    names.iter().any(|name| program::in_path(name).is_some())
}

/// The binaries of a family, the one that `iptables` means first, then the other variant's.
fn tools(family: Family) -> Result<Vec<Tool>, Error> {
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

impl Tool {
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
        let save = self.run("-save", &["-t", "mangle"], "").await?;
        let absent = std::mem::take(&mut ruleset.absent);
        ruleset = Ruleset::parse(self.family, self.program.clone(), &save);
        ruleset.absent = absent;
        Ok(ruleset)
    }

    /// Makes all of these line steps in one transaction: all or none.
    async fn write(&self, steps: &[Step]) -> Result<(), Error> {
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
        let mut args = vec!["--noflush"];
        let seconds = program::LOCK_SECONDS.to_string();
        if self.has_wait {
            args.extend(["--wait", &seconds]);
        }
        self.run("-restore", &args, &input).await.map(|_| ())
    }

    async fn run(&self, verb: &str, args: &[&str], input: &str) -> Result<String, Error> {
        program::run(&format!("{}{verb}", self.program), args, input).await
    }
}
