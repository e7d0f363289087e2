//! The report: the table for the terminal, Markdown, JSON; the chart is in [`chart`].

pub(crate) mod chart;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use comfy_table::{ContentLineStyle, LineStyle, Table, TableStyle};
use serde_json::{Value, json};

use crate::cell::{Extent, Figure, Row, cores};
use crate::programs::Program;
use crate::results::{Connmark, Goal, Results, Verdict};

/// What was run where.
pub(crate) struct Setting {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) kernel: String,
    pub(crate) extent: Extent,
    pub(crate) rounds: u32,
    pub(crate) connmarks: Vec<Connmark>,
    pub(crate) rows: Vec<Row>,
    /// With their versions.
    pub(crate) programs: Vec<(Program, String)>,
}

impl Setting {
    /// The machine and the time, for a run of this extent.
    ///
    /// # Errors
    /// When the machine cannot be asked.
    pub(crate) fn here(
        extent: Extent,
        rounds: u32,
        connmarks: Vec<Connmark>,
        rows: Vec<Row>,
        programs: Vec<(Program, String)>,
    ) -> Result<Self> {
        let info = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        let cpu = info
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(
                || "CPU of unknown model".to_owned(),
                |(_, name)| name.to_owned(),
            );
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")
            .context("cannot read the kernel's release")?;
        let date = Command::new("date")
            .args(["-u", "+%F"])
            .output()
            .context("cannot run date")?;
        Ok(Self {
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            cpu,
            // what follows the version is the builder's own
            kernel: kernel
                .trim()
                .split('-')
                .next()
                .unwrap_or_default()
                .to_owned(),
            extent,
            rounds,
            connmarks,
            rows,
            programs,
        })
    }

    /// One line for the head of a report.
    pub(crate) fn machine(&self) -> String {
        format!(
            "{}, {} cores, Linux {}, {}",
            self.cpu,
            cores(),
            self.kernel,
            self.date
        )
    }

    fn extent(&self) -> String {
        let Extent {
            window,
            connections,
            idle,
            ..
        } = self.extent;
        format!(
            "{} rounds of {:.1} s each, interleaved, medians; {connections} connections, {idle} idle ones",
            self.rounds,
            window.as_secs_f64()
        )
    }

    fn lines(&self) -> impl Iterator<Item = (Row, Figure)> {
        self.rows
            .iter()
            .flat_map(|&row| row.figures().iter().map(move |&figure| (row, figure)))
    }
}

/// Writes `relay.json`, `relay.md` and `relay.svg`.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn write(dir: &Path, setting: &Setting, results: &Results) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let json = serde_json::to_string_pretty(&to_json(setting, results))
        .context("cannot render the results as JSON")?;
    for (name, text) in [
        ("relay.json", json + "\n"),
        ("relay.md", to_markdown(setting, results)),
        ("relay.svg", chart::to_svg(setting, results)),
    ] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// For the terminal.
pub(crate) fn to_text(setting: &Setting, results: &Results) -> String {
    let mut out = format!("{}\n{}\n", setting.machine(), setting.extent());
    for &connmark in &setting.connmarks {
        let table = table(cells(setting, results, connmark));
        let _ = write!(out, "\n{}\n{table}\n", heading(connmark));
    }
    out + &notes(setting, results)
}

/// Lines of words as a table, the first one its heading.
pub(crate) fn table(lines: Vec<Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(
        TableStyle::new()
            .header_lines(ContentLineStyle::none())
            .header_separator(LineStyle::none().fill('─'))
            .content_lines(ContentLineStyle::none()),
    );
    let mut lines = lines.into_iter();
    if let Some(heading) = lines.next() {
        table.set_header(heading);
    }
    table.add_rows(lines);
    table
}

fn to_markdown(setting: &Setting, results: &Results) -> String {
    let mut out = format!("{}. {}.\n", setting.machine(), setting.extent());
    for &connmark in &setting.connmarks {
        let _ = write!(out, "\n**{}**\n\n", heading(connmark));
        for (index, row) in cells(setting, results, connmark).into_iter().enumerate() {
            let _ = writeln!(out, "| {} |", row.join(" | "));
            if index == 0 {
                let _ = writeln!(out, "|---|{}", "---:|".repeat(row.len() - 1));
            }
        }
    }
    out.push('\n');
    for line in notes(setting, results)
        .lines()
        .filter(|line| !line.is_empty())
    {
        let _ = writeln!(out, "- {line}");
    }
    out.push('\n');
    for (program, version) in &setting.programs {
        let settings = program.settings(setting.extent.relay_threads);
        let version = if version.is_empty() {
            String::new()
        } else {
            format!(" {version};")
        };
        let _ = writeln!(out, "- {}:{version} {settings}", program.title());
    }
    out
}

fn heading(connmark: Connmark) -> &'static str {
    if connmark {
        "With the pathway's CONNMARK rules (connection tracking) in every namespace"
    } else {
        "Without CONNMARK rules (connmark=auto, loopback target)"
    }
}

/// The table, its heading first.
fn cells(setting: &Setting, results: &Results, connmark: Connmark) -> Vec<Vec<String>> {
    let titles = setting
        .programs
        .iter()
        .map(|(program, _)| program.title().to_owned());
    let mut table = vec![
        std::iter::once(String::new())
            .chain(titles)
            .chain(["to reach".to_owned()])
            .collect(),
    ];
    for (row, figure) in setting.lines() {
        let empty =
            |&(program, _): &(Program, String)| results.samples(connmark, row, program).is_empty();
        if setting.programs.iter().all(empty) {
            continue;
        }
        let mut line = vec![figure.title().to_owned()];
        for &(program, _) in &setting.programs {
            line.push(match results.verdict(connmark, row, program, figure) {
                Verdict::Absent => "–".to_owned(),
                Verdict::Failed(count) => format!("FAILED ({count})"),
                Verdict::Median(value) => match results.ratio(connmark, row, program, figure) {
                    Some(ratio) => format!("{} ({ratio:.2} ×)", figure.show(value)),
                    None => figure.show(value),
                },
            });
        }
        let goal = match figure.goal() {
            Goal::OfDirect(share) => format!("≥ {share:.2} × direct"),
            Goal::AtMost(limit) => format!("≤ {}", figure.show(limit)),
            Goal::None => String::new(),
        };
        line.push(
            match results.reaches(connmark, row, Program::Mmproxyctl, figure) {
                Some(true) => format!("{goal} ✓"),
                Some(false) => format!("{goal} ✗"),
                None => goal,
            },
        );
        table.push(line);
    }
    table
}

/// What must be known to read the figures, one a line.
fn notes(setting: &Setting, results: &Results) -> String {
    let mut out = String::new();
    for &connmark in &setting.connmarks {
        for &row in &setting.rows {
            for &(program, _) in &setting.programs {
                for (kind, count) in &results.failures(connmark, row, program).0 {
                    let row = row.figures().first().map_or("", |figure| figure.title());
                    let _ = writeln!(
                        out,
                        "FAILED: {}, {row}, connmark {}: {kind} ({count} times)",
                        program.title(),
                        if connmark { "on" } else { "off" },
                    );
                }
            }
        }
    }
    let own_port: Vec<_> = setting
        .programs
        .iter()
        .filter(|(program, _)| {
            *program != Program::Direct
                && setting
                    .rows
                    .iter()
                    .flat_map(|&row| {
                        setting
                            .connmarks
                            .iter()
                            .map(move |&connmark| (connmark, row))
                    })
                    .flat_map(|(connmark, row)| results.samples(connmark, row, *program))
                    .any(|sample| sample.failures.total() == 0 && !sample.keeps_port)
        })
        .map(|(program, _)| program.title())
        .collect();
    if !own_port.is_empty() {
        let _ = writeln!(
            out,
            "the service sees the client's address but not its port: {}",
            own_port.join(", ")
        );
    }
    if let Some((middle, worst)) = results.foreign() {
        let _ = writeln!(
            out,
            "CPU used by others meanwhile, share of the machine: median {:.0} %, worst {:.0} %{}",
            middle * 100.0,
            worst * 100.0,
            if middle > 0.05 {
                ": the machine was not quiet, absolute figures mean little"
            } else {
                ""
            }
        );
    }
    out
}

fn to_json(setting: &Setting, results: &Results) -> Value {
    let Extent {
        warmup,
        window,
        connections,
        idle,
        threads,
        service_threads,
        relay_threads,
    } = setting.extent;
    let mut tables = serde_json::Map::new();
    for &connmark in &setting.connmarks {
        let mut figures = serde_json::Map::new();
        for (row, figure) in setting.lines() {
            let mut programs = serde_json::Map::new();
            for &(program, _) in &setting.programs {
                let samples = results.samples(connmark, row, program);
                if samples.is_empty() {
                    continue;
                }
                let median = match results.verdict(connmark, row, program, figure) {
                    Verdict::Median(value) => Some(value),
                    Verdict::Absent | Verdict::Failed(_) => None,
                };
                let failures = results.failures(connmark, row, program);
                programs.insert(
                    program.title().to_owned(),
                    json!({
                        "median": median,
                        "of_direct": results.ratio(connmark, row, program, figure),
                        "rounds": samples.iter().map(|sample| sample.figures.get(&figure)).collect::<Vec<_>>(),
                        "failed": failures.total(),
                        "failures": failures.0,
                    }),
                );
            }
            figures.insert(figure.key().to_owned(), programs.into());
        }
        let key = if connmark { "connmark" } else { "no_connmark" };
        tables.insert(key.to_owned(), figures.into());
    }
    let programs: Vec<_> = setting
        .programs
        .iter()
        .map(|(program, version)| {
            json!({
                "name": program.title(),
                "version": version,
                "settings": program.settings(relay_threads),
            })
        })
        .collect();
    json!({
        "date": setting.date,
        "machine": { "cpu": setting.cpu, "cores": cores(), "kernel": setting.kernel },
        "extent": {
            "rounds": setting.rounds,
            "warmup_s": warmup.as_secs_f64(),
            "window_s": window.as_secs_f64(),
            "connections": connections,
            "idle_connections": idle,
            "load_threads": threads,
            "service_threads": service_threads,
            "relay_threads": relay_threads,
        },
        "foreign_cpu": results.foreign().map(|(median, worst)| json!({ "median": median, "worst": worst })),
        "programs": programs,
        "tables": tables,
    })
}
