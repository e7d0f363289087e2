//! Who took a piece away, as far as the kernel tells.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::model::Family;
use crate::pathway::piece::{Rule, Step};

/// Who changed something.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Who {
    /// The kernel did it by itself: an interface went down, or IPv6 was switched off.
    Kernel,
    /// A process.
    Process {
        /// Its id.
        pid: u32,
        /// What it is called; a short-lived one is gone before it can be asked.
        name: Option<String>,
    },
    /// It was not told.
    #[default]
    Unknown,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("the kernel itself"),
            Self::Process {
                pid,
                name: Some(name),
            } => write!(f, "{name}, pid {pid}"),
            Self::Process { pid, name: None } => write!(f, "pid {pid}, which is gone"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

impl Who {
    /// The sender of a request, by the port number in the notification about it. Usually that is the
    /// process id; a second socket of one process has a number that is no process's.
    pub(super) fn of_port(port: u32) -> Self {
        if port == 0 {
            return Self::Kernel;
        }
        if port > i32::MAX.cast_unsigned() {
            return Self::Unknown;
        }
        Self::Process {
            pid: port,
            name: name_here(port),
        }
    }
}

/// The name of a process, unless it is known to be in another network namespace: a number from another
/// pid namespace may be another process's here.
fn name_here(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    // not to be seen without CAP_SYS_PTRACE
    let namespace = |process: &str| {
        let link = fs::metadata(format!("/proc/{process}/ns/net")).ok()?;
        Some((link.dev(), link.ino()))
    };
    let elsewhere = |theirs| Some(theirs) != namespace("thread-self");
    if namespace(&pid.to_string()).is_some_and(elsewhere) {
        return None;
    }
    Some(name.trim_end().to_owned())
}

/// The deletions that were told since the last look.
#[derive(Debug, Default)]
pub(super) struct Culprits {
    rules: HashMap<Rule, Who>,
    routes: HashMap<(Family, u32), Who>,
    firewall: HashMap<Option<Family>, Who>,
}

impl Culprits {
    pub(super) fn clear(&mut self) {
        self.rules.clear();
        self.routes.clear();
        self.firewall.clear();
    }

    pub(super) fn rule(&mut self, rule: Rule, who: Who) {
        self.rules.insert(rule, who);
    }

    pub(super) fn route(&mut self, family: Family, table: u32, who: Who) {
        self.routes.insert((family, table), who);
    }

    /// `family` is none for a table of both.
    pub(super) fn firewall(&mut self, family: Option<Family>, who: Who) {
        self.firewall.insert(family, who);
    }

    /// Who took away what this step would make.
    pub(super) fn of(&self, step: &Step) -> Who {
        let who = match step {
            Step::AddRule(rule) => self.rules.get(rule),
            Step::AddRoute(route) => self.routes.get(&(route.family, route.table)),
            step => self
                .firewall
                .get(&step.family())
                .or_else(|| self.firewall.get(&None)),
        };
        who.cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_processes_as_long_as_they_live() {
        assert_eq!(Who::of_port(0), Who::Kernel);
        assert_eq!(Who::of_port(0xffff_ff00), Who::Unknown);
        let own = Who::of_port(std::process::id());
        assert!(
            matches!(&own, Who::Process { name: Some(name), .. } if !name.is_empty()),
            "{own}"
        );
        // above every pid_max
        let gone = Who::of_port(1 << 30);
        assert_eq!(gone.to_string(), "pid 1073741824, which is gone");
    }
}
