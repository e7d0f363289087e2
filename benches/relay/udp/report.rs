//! The UDP rows' report: a table for the terminal, Markdown, JSON, a chart.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::load::{PATIENCE, SIZE};
use super::{Cell, DISTURBED, Results, Row, Sample, Sharing, TRIES, programs};
use crate::programs::Program;
use crate::report::chart::{self, Bar, Panel};
use crate::report::{Setting, table};
use crate::results::{median, thousands};

/// What mmproxyctl shall reach, as a share of the direct rate.
const RATE: f64 = 0.60;
/// How much more than the direct row it may lose, as a share of the questions.
const LOSS: f64 = 0.01;

/// One sample, for the progress.
pub(super) fn line(sample: &Sample) -> String {
    let cpu = sample
        .cpu
        .map_or_else(String::new, |cpu| format!(", CPU {cpu:.2} µs"));
    format!(
        "{} per s, loss {:.2} %, p99 {} µs{cpu} [others' CPU {:.0} %]",
        thousands(sample.rate),
        sample.loss * 100.0,
        thousands(sample.p99),
        sample.foreign * 100.0
    )
}

/// Writes `udp.json`, `udp.md` and `udp.svg`.
///
/// # Errors
/// When a file cannot be written.
pub(super) fn write(dir: &Path, setting: &Setting, rows: &[Row], results: &Results) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let json = serde_json::to_string_pretty(&to_json(setting, rows, results))
        .context("cannot render the results as JSON")?;
    for (name, text) in [
        ("udp.json", json + "\n"),
        ("udp.md", to_markdown(setting, rows, results)),
        ("udp.svg", to_svg(setting, rows, results)),
    ] {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// For the terminal.
pub(super) fn to_text(setting: &Setting, rows: &[Row], results: &Results) -> String {
    let mut out = format!("{}\n{}\n", setting.machine(), extent(setting));
    let _ = write!(out, "\n{}\n\n", table(cells(setting, rows, results)));
    out + &notes(setting, rows, results)
}

fn to_markdown(setting: &Setting, rows: &[Row], results: &Results) -> String {
    let mut out = format!("{}. {}.\n\n", setting.machine(), extent(setting));
    for (index, row) in cells(setting, rows, results).into_iter().enumerate() {
        let _ = writeln!(out, "| {} |", row.join(" | "));
        if index == 0 {
            let _ = writeln!(out, "|---|{}", "---:|".repeat(row.len() - 1));
        }
    }
    out.push('\n');
    for line in notes(setting, rows, results).lines() {
        let _ = writeln!(out, "- {line}");
    }
    for (program, version) in &setting.programs {
        let settings = programs::settings(*program, setting.extent.relay_threads);
        let version = match version.as_str() {
            "" => String::new(),
            version => format!(" {version};"),
        };
        let _ = writeln!(out, "- {}:{version} {settings}", program.title());
    }
    out
}

/// Rate and loss, and what it costs the relay, by row.
fn to_svg(setting: &Setting, rows: &[Row], results: &Results) -> String {
    let panels: Vec<Panel> = rows
        .iter()
        .flat_map(|&row| {
            let (clients, each) = row;
            let bars = |bar: &dyn Fn(Program, &Cell) -> Bar| {
                let bar = |program| match results.cells.get(&(row, program)) {
                    None => Bar::Absent,
                    Some(cell) if cell.failure.is_some() => Bar::Failed("failed".to_owned()),
                    Some(cell) => bar(program, cell),
                };
                let programs = setting.programs.iter();
                programs
                    .map(|&(program, _)| (program, bar(program)))
                    .collect()
            };
            let rate = |cell: &Cell| middle(cell, |sample| Some(sample.rate)).unwrap_or_default();
            let direct = results.cells.get(&(row, Program::Direct));
            [
                Panel {
                    title: format!("{}, answers per s", load(clients, each)),
                    is_rate: true,
                    bars: bars(&|program, cell| {
                        let times = ratio(results, row, program)
                            .map_or_else(String::new, |ratio| format!(", {ratio:.2} ×"));
                        let lost = middle(cell, |sample| Some(sample.loss)).unwrap_or_default();
                        let rate = rate(cell);
                        let said =
                            format!("{}{times}, lost {:.1} %", thousands(rate), lost * 100.0);
                        Bar::Value(rate, said)
                    }),
                    goal: direct.map(|direct| RATE * rate(direct)),
                },
                Panel {
                    title: format!("{}, relay CPU, µs each", load(clients, each)),
                    is_rate: false,
                    bars: bars(&|_, cell| match middle(cell, |sample| sample.cpu) {
                        None => Bar::Absent,
                        Some(cpu) => Bar::Value(cpu, format!("{cpu:.1}")),
                    }),
                    goal: None,
                },
            ]
        })
        .collect();
    chart::draw(&panels, &setting.machine())
}

/// How much there is to do, in words.
fn load(clients: usize, each: usize) -> String {
    let plural = if clients == 1 { "" } else { "s" };
    format!("{clients} client{plural} × {each} under way")
}

fn extent(setting: &Setting) -> String {
    format!(
        "{} rounds of {:.1} s each, interleaved, medians; {SIZE} bytes there and back over loopback, each \
         client its own socket, PROXY v2 on every datagram; lost is what is not back within {} ms",
        setting.rounds,
        setting.extent.window.as_secs_f64(),
        PATIENCE.as_millis()
    )
}

/// The table, its heading first.
fn cells(setting: &Setting, rows: &[Row], results: &Results) -> Vec<Vec<String>> {
    let titles = setting
        .programs
        .iter()
        .map(|(program, _)| program.title().to_owned());
    let heading = std::iter::once(String::new()).chain(titles);
    let mut table = vec![heading.chain(["to reach".to_owned()]).collect::<Vec<_>>()];
    for &row in rows {
        let (clients, each) = row;
        let of = |program| results.cells.get(&(row, program));
        let mut line = |title: String, goal: String, show: &dyn Fn(Program, &Cell) -> String| {
            let mut cells = vec![title];
            cells.extend(
                setting
                    .programs
                    .iter()
                    .map(|&(program, _)| match of(program) {
                        Some(cell) if cell.failure.is_some() => "FAILED".to_owned(),
                        Some(cell) => show(program, cell),
                        None => "–".to_owned(),
                    }),
            );
            cells.push(goal);
            table.push(cells);
        };
        let (rate_reached, loss_reached) = reached(row, results);
        line(
            format!("{}, answers per s", load(clients, each)),
            format!("≥ {RATE:.2} × direct{}", mark(rate_reached)),
            &|program, cell| {
                let rate = thousands(middle(cell, |sample| Some(sample.rate)).unwrap_or_default());
                match ratio(results, row, program) {
                    Some(ratio) => format!("{rate} ({ratio:.2} ×)"),
                    None => rate,
                }
            },
        );
        line(
            "… lost".to_owned(),
            format!("≤ direct + {:.0} %{}", LOSS * 100.0, mark(loss_reached)),
            &|_, cell| {
                let loss = middle(cell, |sample| Some(sample.loss)).unwrap_or_default();
                format!("{:.2} %", loss * 100.0)
            },
        );
        line("… p99 µs".to_owned(), String::new(), &|_, cell| {
            thousands(middle(cell, |sample| Some(sample.p99)).unwrap_or_default())
        });
        line(
            "… relay CPU, µs per question and answer".to_owned(),
            String::new(),
            &|_, cell| {
                middle(cell, |sample| sample.cpu)
                    .map_or("–".to_owned(), |cpu| format!("{cpu:.2}"))
            },
        );
    }
    table
}

fn mark(reached: Option<bool>) -> &'static str {
    match reached {
        Some(true) => " ✓",
        Some(false) => " ✗",
        None => "",
    }
}

/// Whether mmproxyctl reaches the rate and the loss.
fn reached(row: Row, results: &Results) -> (Option<bool>, Option<bool>) {
    let loss = |program| {
        let cell = results.cells.get(&(row, program))?;
        middle(cell, |sample| Some(sample.loss))
    };
    let rate = ratio(results, row, Program::Mmproxyctl).map(|ratio| ratio >= RATE);
    let lost = loss(Program::Mmproxyctl)
        .zip(loss(Program::Direct))
        .map(|(own, direct)| own <= direct + LOSS);
    (rate, lost)
}

fn middle(cell: &Cell, figure: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
    median(cell.samples.iter().filter_map(figure))
}

/// The median of the rounds' ratios to the direct rate.
fn ratio(results: &Results, row: Row, program: Program) -> Option<f64> {
    if program == Program::Direct {
        return None;
    }
    let own = results.cells.get(&(row, program))?;
    let direct = results.cells.get(&(row, Program::Direct))?;
    let pairs = own.samples.iter().zip(&direct.samples);
    median(pairs.map(|(own, direct)| own.rate / direct.rate))
}

/// What must be known to read the figures, one a line.
fn notes(setting: &Setting, rows: &[Row], results: &Results) -> String {
    let mut out = String::new();
    for &(program, _) in &setting.programs {
        let failed: Vec<(Row, &String)> = rows
            .iter()
            .filter_map(|&row| {
                let cell = results.cells.get(&(row, program))?;
                Some((row, cell.failure.as_ref()?))
            })
            .collect();
        if let Some((_, reason)) = failed.first() {
            let rows: Vec<String> = failed
                .iter()
                .map(|((clients, each), _)| format!("{clients} × {each}"))
                .collect();
            let _ = writeln!(
                out,
                "FAILED: {}, {} clients: {reason}",
                program.title(),
                rows.join(", ")
            );
        }
        if results.sharing.get(&program) == Some(&Sharing::Mixed) {
            let _ = writeln!(
                out,
                "{} takes all clients behind one proxy port for the first of them",
                program.title()
            );
        }
    }
    let foreign = || {
        let samples = results.cells.values().flat_map(|cell| &cell.samples);
        samples.map(|sample| sample.foreign)
    };
    if let Some(middle) = median(foreign()) {
        let _ = writeln!(
            out,
            "others used {:.0} % of the machine meanwhile (worst {:.0} %); above {:.0} % a cell is measured \
             again, {TRIES} times at most",
            middle * 100.0,
            foreign().fold(0.0, f64::max) * 100.0,
            DISTURBED * 100.0
        );
    }
    out
}

fn to_json(setting: &Setting, rows: &[Row], results: &Results) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|&row| {
            let (clients, each) = row;
            let programs: serde_json::Map<String, Value> = setting
                .programs
                .iter()
                .filter_map(|&(program, _)| {
                    let cell = results.cells.get(&(row, program))?;
                    let round = |sample: &Sample| {
                        json!({
                            "per_s": sample.rate,
                            "loss": sample.loss,
                            "p99_us": sample.p99,
                            "relay_cpu_us": sample.cpu,
                            "foreign_cpu": sample.foreign,
                        })
                    };
                    let value = json!({
                        "per_s": middle(cell, |sample| Some(sample.rate)),
                        "of_direct": ratio(results, row, program),
                        "loss": middle(cell, |sample| Some(sample.loss)),
                        "p99_us": middle(cell, |sample| Some(sample.p99)),
                        "relay_cpu_us": middle(cell, |sample| sample.cpu),
                        "rounds": cell.samples.iter().map(round).collect::<Vec<_>>(),
                        "failure": cell.failure,
                    });
                    Some((program.title().to_owned(), value))
                })
                .collect();
            json!({ "clients": clients, "under_way_each": each, "programs": programs })
        })
        .collect();
    let programs: Vec<Value> = setting
        .programs
        .iter()
        .map(|(program, version)| {
            json!({
                "name": program.title(),
                "version": version,
                "settings": programs::settings(*program, setting.extent.relay_threads),
                "tells_clients_of_one_port_apart":
                    results.sharing.get(program).map(|sharing| *sharing == Sharing::Apart),
            })
        })
        .collect();
    json!({
        "date": setting.date,
        "machine": {
            "cpu": setting.cpu,
            "cores": crate::cell::cores(),
            "kernel": setting.kernel,
        },
        "rounds": setting.rounds,
        "window_s": setting.extent.window.as_secs_f64(),
        "payload_bytes": SIZE,
        "patience_ms": PATIENCE.as_millis() as u64,
        "programs": programs,
        "rows": rows,
    })
}
