//! What processes use: CPU time, memory, descriptors, per thread and over a tree of processes.
//!
//! Owns: reading `/proc` and the CPU clocks. Must not know: which program it is.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// A process and all its descendants.
///
/// # Errors
/// When `/proc` cannot be listed.
pub(crate) fn tree(root: u32) -> Result<Vec<u32>> {
    let mut parents = BTreeMap::new();
    for entry in fs::read_dir("/proc")
        .context("cannot list /proc")?
        .flatten()
    {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // a process that ended between listing and reading is nobody's descendant any more
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        if let Some(parent) = field(&stat, 4).and_then(|text| text.parse::<u32>().ok()) {
            parents.insert(pid, parent);
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(
            parents
                .iter()
                .filter(|&(_, &of)| of == parent)
                .map(|(&pid, _)| pid),
        );
        next += 1;
    }
    Ok(found)
}

/// CPU time of processes so far, user and system, all their threads, also those that ended.
///
/// It is the sum that `/proc/PID/stat` shows as utime + stime, from the process's CPU clock, which counts
/// nanoseconds rather than ticks of 10 ms.
///
/// # Errors
/// When a process is gone.
pub(crate) fn cpu_time(pids: &[u32]) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for &pid in pids {
        let clock = clock_getcpuclockid(Pid::from_raw(pid.cast_signed()))
            .with_context(|| format!("process {pid} is gone"))?;
        let time = clock_gettime(clock)
            .with_context(|| format!("cannot read the CPU clock of process {pid}"))?;
        total += Duration::from(time);
    }
    Ok(total)
}

/// CPU time of every thread of processes so far, by thread id, with its name.
///
/// # Errors
/// When a process is gone.
pub(crate) fn thread_times(pids: &[u32]) -> Result<BTreeMap<u32, (String, Duration)>> {
    let mut threads = BTreeMap::new();
    for pid in pids {
        let path = format!("/proc/{pid}/task");
        for task in fs::read_dir(&path)
            .with_context(|| format!("cannot list {path}"))?
            .flatten()
        {
            let dir = task.path();
            let (Some(id), Ok(times), Ok(name)) = (
                task.file_name().to_str().and_then(|name| name.parse().ok()),
                fs::read_to_string(dir.join("schedstat")),
                fs::read_to_string(dir.join("comm")),
            ) else {
                continue;
            };
            // schedstat: nanoseconds on a CPU, nanoseconds waiting for one, times scheduled
            let nanoseconds = times.split(' ').next().and_then(|text| text.parse().ok());
            threads.insert(
                id,
                (
                    name.trim().to_owned(),
                    Duration::from_nanos(nanoseconds.unwrap_or_default()),
                ),
            );
        }
    }
    Ok(threads)
}

/// Memory and descriptors of processes now.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Holdings {
    /// Proportional set size, kB: pages that several processes share are counted once.
    pub(crate) pss: u64,
    /// Resident set size, kB.
    pub(crate) rss: u64,
    /// Open descriptors.
    pub(crate) descriptors: u64,
}

/// What processes hold now.
///
/// # Errors
/// When a process is gone.
pub(crate) fn holdings(pids: &[u32]) -> Result<Holdings> {
    let mut total = Holdings::default();
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let kilobytes = |key: &str| -> Option<u64> {
            let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
            rest.split_whitespace().next()?.parse().ok()
        };
        total.pss += kilobytes("Pss:").with_context(|| format!("{path} has no Pss"))?;
        total.rss += kilobytes("Rss:").with_context(|| format!("{path} has no Rss"))?;
        let path = format!("/proc/{pid}/fd");
        total.descriptors += fs::read_dir(&path)
            .with_context(|| format!("cannot list {path}"))?
            .count() as u64;
    }
    Ok(total)
}

/// Busy time of all CPUs of the machine so far, in ticks' resolution.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub(crate) fn machine_busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .flat_map(str::parse)
        .collect();
    // user nice system idle iowait irq softirq steal; guest time is already part of user
    let busy: u64 = [0, 1, 2, 5, 6, 7]
        .iter()
        .filter_map(|&index| ticks.get(index))
        .sum();
    // USER_HZ is 100 on every architecture this runs on
    Ok(Duration::from_millis(busy * 10))
}

/// A field of `/proc/PID/stat` by its number in proc(5); the name (field 2) may hold spaces and parentheses.
fn field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(number - 3)
}
