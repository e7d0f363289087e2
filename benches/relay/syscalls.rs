//! System calls per connection, counted by `strace -c` on a relay that serves connections one by one.
//!
//! One by one, because under load a relay handles several events per wait and the count depends on the load:
//! this is the most it takes. Everything from accept to the last close is in it.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cell::{Extent, Stand};
use crate::load::exchange;
use crate::programs::Program;
use crate::report;

/// How many connections are counted over: a background call or two disappears in the division.
const CONNECTIONS: usize = 500;

/// Prints the table.
///
/// # Errors
/// When strace is missing or a relay fails.
pub(crate) fn run(programs: &[Program], extent: Extent) -> Result<()> {
    let mut columns = Vec::new();
    for &program in programs
        .iter()
        .filter(|&&program| program != Program::Direct)
    {
        columns.push((program.title(), count(program, extent)?));
    }
    let mut names: Vec<&String> = columns.iter().flat_map(|(_, calls)| calls.keys()).collect();
    names.sort();
    names.dedup();
    let titles = columns.iter().map(|(title, _)| (*title).to_owned());
    let mut lines = vec![line("calls per connection", titles)];
    let per_connection = |calls: u64| calls as f64 / CONNECTIONS as f64;
    for name in names {
        let calls: Vec<f64> = columns
            .iter()
            .map(|(_, calls)| per_connection(calls.get(name).copied().unwrap_or_default()))
            .collect();
        // timers and start-up leftovers: not part of a connection
        if calls.iter().any(|&each| each >= 0.05) {
            let shown = calls.iter().map(|each| format!("{each:.2}"));
            lines.push(line(name, shown));
        }
    }
    let totals = columns
        .iter()
        .map(|(_, calls)| format!("{:.2}", per_connection(calls.values().sum())));
    lines.push(line("all", totals));
    println!("{}", report::table(lines));
    Ok(())
}

fn line(first: &str, others: impl Iterator<Item = String>) -> Vec<String> {
    std::iter::once(first.to_owned()).chain(others).collect()
}

fn count(program: Program, extent: Extent) -> Result<BTreeMap<String, u64>> {
    let stand = Stand::new(program, false, extent)?;
    stand.ready()?;
    let target = stand.target();
    // what is set up once is not part of a connection
    stand
        .namespace()
        .enter(|| exchange::one_by_one(target, 50))?;
    let summary = stand.dir().join("strace.txt");
    let processes = stand.relay_processes()?;
    let mut command = Command::new("strace");
    command
        .args(["-f", "-c", "-o"])
        .arg(&summary)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    for pid in &processes {
        command.arg("-p").arg(pid.to_string());
    }
    let tracer = Tracer(command.spawn().context("cannot run strace: install it")?);
    wait_until_traced(&processes)?;
    stand
        .namespace()
        .enter(|| exchange::one_by_one(target, CONNECTIONS))?;
    tracer.finish()?;
    stand.still_runs()?;
    let text = fs::read_to_string(&summary).context("strace wrote no summary")?;
    let calls = parse(&text);
    if calls.is_empty() {
        bail!("strace counted nothing for {}", program.title());
    }
    Ok(calls)
}

/// A running strace; ends with the value.
struct Tracer(Child);

impl Tracer {
    /// Lets it detach and write its summary.
    fn finish(mut self) -> Result<()> {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGINT)
            .context("cannot interrupt strace")?;
        self.0.wait().context("cannot wait for strace")?;
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // both fail only when it is gone already
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait_until_traced(processes: &[u32]) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    let untraced = |pid: &u32| -> Result<bool> {
        let path = format!("/proc/{pid}/task");
        for task in fs::read_dir(&path)
            .with_context(|| format!("cannot list {path}"))?
            .flatten()
        {
            let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
            if status.contains("TracerPid:\t0\n") {
                return Ok(true);
            }
        }
        Ok(false)
    };
    for pid in processes {
        while untraced(pid)? {
            if Instant::now() > end {
                bail!("strace has not attached to process {pid} within ten seconds");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(())
}

/// Lines are `% time, seconds, usecs/call, calls, [errors,] name`.
fn parse(summary: &str) -> BTreeMap<String, u64> {
    summary
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let name = *words.last()?;
            let calls = words.get(3)?.parse().ok()?;
            (name != "total" && words.len() >= 5).then(|| (name.to_owned(), calls))
        })
        .collect()
}
