//! What was repaired, counted, and kept in a file of the runtime directory, where `pathway list`,
//! `status` and the metrics of other processes find it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::pieces::Kind;
use crate::model::Mark;
use crate::runtime_dir::{self, RuntimeDir};

/// The suffix of these files in the runtime directory.
const SUFFIX: &str = "repairs";

/// Repaired pieces by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Rules.
    pub rule: u64,
    /// Routes.
    pub route: u64,
    /// What the firewall holds.
    pub firewall: u64,
}

impl Counts {
    /// Those of one kind.
    pub fn of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Rule => self.rule,
            Kind::Route => self.route,
            Kind::Firewall => self.firewall,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        Kind::ALL.into_iter().map(|kind| self.of(kind)).sum()
    }

    fn add(&mut self, kind: Kind) {
        *match kind {
            Kind::Rule => &mut self.rule,
            Kind::Route => &mut self.route,
            Kind::Firewall => &mut self.firewall,
        } += 1;
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.rule += other.rule;
        self.route += other.route;
        self.firewall += other.firewall;
    }
}

/// What one process has repaired since it started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repairs {
    /// The process.
    pub pid: u32,
    /// Every pathway that it keeps, by mark.
    pub pathways: BTreeMap<u32, Counts>,
    /// How often a pathway was left alone because something took it away again and again.
    pub storms: u64,
    /// How often the kernel's events came too fast, and everything was read again.
    pub overruns: u64,
}

impl Repairs {
    pub(super) fn new() -> Self {
        Self {
            pid: std::process::id(),
            pathways: BTreeMap::new(),
            storms: 0,
            overruns: 0,
        }
    }

    /// Keeps the counts of these pathways, begins those that are new, and drops all others.
    pub(super) fn of(&mut self, marks: &BTreeSet<Mark>) {
        let of_them = |mark: &u32| Mark::new(*mark).is_some_and(|mark| marks.contains(&mark));
        self.pathways.retain(|mark, _| of_them(mark));
        for mark in marks {
            self.pathways.entry(mark.get()).or_default();
        }
    }

    pub(super) fn count(&mut self, mark: Mark, kind: Kind) {
        self.pathways.entry(mark.get()).or_default().add(kind);
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.pathways.values().map(Counts::total).sum()
    }
}

/// A file that says what a running process has repaired. Removed with the value.
#[derive(Debug)]
pub(super) struct Published {
    path: PathBuf,
    /// What it says.
    last: Option<Repairs>,
}

impl Published {
    pub(super) fn new(runtime: &RuntimeDir, name: &str) -> Result<Self, runtime_dir::Error> {
        Ok(Self {
            path: runtime.file(name, SUFFIX)?,
            last: None,
        })
    }

    /// Replaces the file in one step where it says something else: who reads it meanwhile sees the old one.
    pub(super) fn update(&mut self, repairs: &Repairs) -> io::Result<()> {
        if self.last.as_ref() == Some(repairs) {
            return Ok(());
        }
        let next = self.path.with_extension("repairs-next");
        // root shares the directory with the relays' user, who must not be able to lead it elsewhere
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::File::create_new(&next)?;
        serde_json::to_writer(&file, repairs)?;
        file.write_all(b"\n")?;
        fs::rename(&next, &self.path)?;
        self.last = Some(repairs.clone());
        Ok(())
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        // a successor may have written its own, or it may be gone with the directory
        let own = |repairs: &Repairs| repairs.pid == std::process::id();
        if read(&self.path).as_ref().is_some_and(own) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the processes that keep pathways here have repaired. A file that cannot be read, or whose process
/// is gone, is passed over.
///
/// # Errors
/// When the directory cannot be read.
pub fn published(runtime: &RuntimeDir) -> Result<Vec<Repairs>, runtime_dir::Error> {
    let mut all: Vec<Repairs> = runtime
        .files(SUFFIX)?
        .iter()
        .filter_map(|(_, path)| read(path))
        .collect();
    all.retain(|repairs| is_alive(repairs.pid));
    Ok(all)
}

fn read(path: &Path) -> Option<Repairs> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// What was repaired of each pathway, by mark, whoever did it.
///
/// # Errors
/// As [`published`].
pub fn by_pathway(runtime: &RuntimeDir) -> Result<BTreeMap<u32, Counts>, runtime_dir::Error> {
    let mut sums = BTreeMap::<u32, Counts>::new();
    for repairs in published(runtime)? {
        for (mark, counts) in repairs.pathways {
            *sums.entry(mark).or_default() += counts;
        }
    }
    Ok(sums)
}

/// /proc may hide what is another user's; a signal that is not allowed is an answer, too.
fn is_alive(pid: u32) -> bool {
    match i32::try_from(pid) {
        Ok(pid) => kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_found_until_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::resolve(Some(dir.path().to_owned()));
        assert!(published(&runtime).unwrap().is_empty());
        let mut file = Published::new(&runtime, "pathways.watch").unwrap();
        let mut repairs = Repairs::new();
        for kind in [Kind::Rule, Kind::Rule, Kind::Firewall] {
            repairs.count(Mark::new(123).unwrap(), kind);
            file.update(&repairs).unwrap();
        }
        let found = published(&runtime).unwrap();
        assert_eq!(found, std::slice::from_ref(&repairs));
        assert_eq!((found[0].pathways[&123].rule, found[0].total()), (2, 3));
        // of a process that is gone, and no JSON
        repairs.pid = 1 << 30;
        let mut dead = Published::new(&runtime, "dead").unwrap();
        dead.update(&repairs).unwrap();
        let left = dead.path.clone();
        drop(dead);
        assert!(left.exists(), "a file of another process was removed");
        fs::write(runtime.file("bad", SUFFIX).unwrap(), "{").unwrap();
        assert_eq!(published(&runtime).unwrap(), found);
        drop(file);
        assert!(published(&runtime).unwrap().is_empty());
    }
}
