//! `status`: what runs, as a table of all instances or some in full.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use comfy_table::CellAlignment;

use super::ask::Processes;
use super::output::{Results, results, table, trimmed};
use super::units::{byte_rate, bytes, rate, span};
use crate::cli::{Global, StatusArgs};
use crate::overview::{InstanceReport, PathwayState, Process, State};
use crate::pathway::watch::Kind;
use crate::relay::counters::{ConnectFailure, Refusal, Totals};
use crate::relay::ports::Port;
use crate::relay::report::LastError;
use crate::relay::udp::counters::{Dropped, Ended as EndedFlow};

/// For how long an error is mentioned below the table.
const RECENT: Duration = Duration::from_secs(15 * 60);

/// Runs the verb.
pub(super) fn run(global: &Global, args: &StatusArgs) -> anyhow::Result<ExitCode> {
    loop {
        // anew each time: processes come and go
        let processes = Processes::find(global).and_then(|mut all| all.status(&args.instances));
        let Some(pause) = args.watch else {
            show(&processes?, args, &mut results())?;
            return Ok(ExitCode::SUCCESS);
        };
        let mut out = results();
        if io::stdout().is_terminal() {
            // home, then clear to the end: no flicker
            write!(out, "\x1b[H\x1b[2J")?;
        }
        match processes {
            Ok(processes) => show(&processes, args, &mut out)?,
            // a restart is what one watches for
            Err(error) => writeln!(out, "{error:#}")?,
        }
        if !args.json && !io::stdout().is_terminal() {
            writeln!(out)?;
        }
        out.flush()?;
        if out.are_unread() {
            return Ok(ExitCode::SUCCESS);
        }
        drop(out);
        std::thread::sleep(pause);
    }
}

fn show(processes: &[Process], args: &StatusArgs, out: &mut Results) -> anyhow::Result<()> {
    if args.json && args.watch.is_some() {
        writeln!(out, "{}", serde_json::to_string(processes)?)?;
        return Ok(());
    }
    if args.json {
        serde_json::to_writer_pretty(&mut *out, processes)?;
        writeln!(out)?;
        return Ok(());
    }
    let text = if args.instances.is_empty() {
        overview(processes)
    } else {
        let blocks: Vec<String> = each(processes)
            .map(|(process, instance)| in_full(process, instance))
            .collect();
        blocks.join("\n")
    };
    out.write_all(text.as_bytes())?;
    Ok(())
}

fn each(processes: &[Process]) -> impl Iterator<Item = (&Process, &InstanceReport)> {
    processes
        .iter()
        .flat_map(|process| process.instances.iter().map(move |one| (process, one)))
}

/// How many connections were not relayed, by whoever's fault.
pub(super) fn errors(totals: &Totals) -> u64 {
    totals.refused.all() + totals.connect_failed.all()
}

/// `123 (vps01)`.
pub(super) fn pathway_name(instance: &InstanceReport) -> String {
    let pathway = &instance.pathway;
    match (&pathway.name, pathway.mark) {
        (Some(name), mark) => format!("{mark} ({name})"),
        (None, 0) => "-".to_owned(),
        (None, mark) => mark.to_string(),
    }
}

fn overview(processes: &[Process]) -> String {
    let mut rows = table([
        "INSTANCE", "PATHWAY", "", "LISTEN", "TARGET", "STATE", "UP", "ACTIVE", "TOTAL", "/s",
        "IN", "OUT", "ERRORS",
    ]);
    for column in 6..13 {
        if let Some(column) = rows.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for (_, one) in each(processes) {
        let totals = &one.totals;
        rows.add_row([
            one.name.clone(),
            pathway_name(one),
            one.pathway.state.name().to_owned(),
            listen(one),
            one.targets.join(" "),
            one.standing.state.name().to_owned(),
            span(one.standing.for_ms),
            totals.active.to_string(),
            totals.accepted.to_string(),
            rate(one.rates.connections),
            bytes(totals.bytes_to_target),
            bytes(totals.bytes_to_client),
            errors(totals).to_string(),
        ]);
    }
    let mut text = trimmed(&rows) + "\n";
    let notes: String = each(processes).filter_map(|(_, one)| note(one)).collect();
    if !notes.is_empty() {
        text.push('\n');
        text.push_str(&notes);
    }
    text
}

fn listen(one: &InstanceReport) -> String {
    if one.protocol == "tcp" {
        one.listen.clone()
    } else {
        format!("{}/{}", one.listen, one.protocol)
    }
}

/// What is not as it should be.
fn note(one: &InstanceReport) -> Option<String> {
    let mut text = String::new();
    let name = &one.name;
    if one.standing.state == State::Waiting
        && let Some(failure) = &one.standing.last_failure
    {
        let _ = writeln!(text, "{name}: {failure}");
    }
    match one.pathway.state {
        PathwayState::InPlace | PathwayState::Unmarked => {}
        PathwayState::Incomplete => {
            // a process of an older version says nothing of it
            let fix = match &one.pathway.fix {
                Some(fix) => fix.clone(),
                None => format!("run mmproxyctl pathway add {}", one.pathway.mark),
            };
            let _ = writeln!(text, "{name}: its pathway is incomplete: {fix}");
            for finding in &one.pathway.findings {
                let _ = writeln!(text, "  {finding}");
            }
        }
        PathwayState::Unknown => {
            for why in &one.pathway.findings {
                let _ = writeln!(text, "{name}: its pathway could not be looked at: {why}");
            }
        }
    }
    if let Some(error) = &one.last_error
        && since(error.at) <= RECENT
    {
        let _ = writeln!(text, "{name}: {}", last_error(error));
    }
    (!text.is_empty()).then_some(text)
}

fn since(at: u64) -> Duration {
    UNIX_EPOCH
        .checked_add(Duration::from_secs(at))
        .and_then(|at| SystemTime::now().duration_since(at).ok())
        .unwrap_or_default()
}

fn last_error(error: &LastError) -> String {
    let ago = span(since(error.at).as_secs() * 1000);
    let client = error
        .client
        .map(|client| format!(", client {client}"))
        .unwrap_or_default();
    format!(
        "{ago} ago, proxy {}{client}: {}",
        error.proxy, error.message
    )
}

fn in_full(process: &Process, one: &InstanceReport) -> String {
    let totals = &one.totals;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(text, "  {name:<9} {value}");
        }
    };
    let standing = &one.standing;
    let mut state = format!(
        "{} for {}, pid {}",
        standing.state.name(),
        span(standing.for_ms),
        process.pid
    );
    if standing.failures > 0 {
        let _ = write!(state, ", failed {} times", standing.failures);
    }
    line("state", state);
    line("failure", standing.last_failure.clone().unwrap_or_default());
    let mut pathway = format!("{}, {}", pathway_name(one), one.pathway.state.name());
    if let Some(repairs) = one.pathway.repairs {
        let kinds_of = Kind::ALL.map(|kind| (kind.name(), repairs.of(kind)));
        let kinds_of = match repairs.total() {
            0 => String::new(),
            _ => format!(" ({})", kinds(&kinds_of)),
        };
        let _ = write!(pathway, ", kept: {} repairs{kinds_of}", repairs.total());
    }
    line("pathway", pathway);
    for finding in &one.pathway.findings {
        line("", finding.clone());
    }
    line("listen", format!("{} ({})", one.listen, one.protocol));
    line("target", one.targets.join(", "));
    line(
        "conns",
        format!(
            "{} active ({} without a header yet), {} in all, {}/s",
            totals.active,
            totals.waiting,
            totals.accepted,
            rate(one.rates.connections)
        ),
    );
    line(
        "bytes",
        format!(
            "{} to the target ({}), {} to clients ({})",
            bytes(totals.bytes_to_target),
            byte_rate(one.rates.bytes_to_target),
            bytes(totals.bytes_to_client),
            byte_rate(one.rates.bytes_to_client)
        ),
    );
    line("ports", busiest(&one.ports));
    if let Some(udp) = &one.datagrams {
        line(
            "datagrams",
            format!(
                "{} to the target, {} to clients",
                udp.datagrams_to_target, udp.datagrams_to_client
            ),
        );
        let dropped = Dropped::ALL.map(|kind| (kind.name(), udp.dropped.of(kind)));
        line("dropped", kinds(&dropped));
        let overflows = [
            ("from proxies", udp.overflow_from_proxy),
            ("from the target", udp.overflow_from_target),
        ];
        line("overflow", kinds(&overflows));
        let flows = EndedFlow::ALL.map(|kind| (kind.name(), udp.ended.of(kind)));
        line("flows", kinds(&flows));
    }
    let refused = Refusal::ALL.map(|kind| (kind.name(), totals.refused.of(kind)));
    line("refused", kinds(&refused));
    let failed = ConnectFailure::ALL.map(|kind| (kind.name(), totals.connect_failed.of(kind)));
    line("connect", kinds(&failed));
    let ended = [
        ("empty (health checks)", totals.empty),
        ("reset", totals.resets),
        ("idle-timeout", totals.idle_ended),
        ("killed", totals.killed),
    ];
    line("ended", kinds(&ended));
    if totals.ports_given_up > 0 {
        line(
            "ports",
            format!("{} given up, the address kept", totals.ports_given_up),
        );
    }
    if totals.accept_pauses > 0 {
        line(
            "pauses",
            format!("{}: descriptors ran out", totals.accept_pauses),
        );
    }
    line(
        "last",
        one.last_error.as_ref().map(last_error).unwrap_or_default(),
    );
    format!("{}\n{text}", one.name)
}

/// Where the most came of a range of ports: `7 at 10000, 1 at 10003, 5 at 12 more`.
fn busiest(ports: &[Port]) -> String {
    const SHOWN: usize = 10;
    let mut ports = ports.to_vec();
    ports.sort_by_key(|one| std::cmp::Reverse(one.accepted));
    let shown = ports.iter().take(SHOWN);
    let mut texts: Vec<String> = shown
        .map(|one| format!("{} at {}", one.accepted, one.port))
        .collect();
    if let Some(rest) = ports.get(SHOWN..).filter(|rest| !rest.is_empty()) {
        let accepted: u64 = rest.iter().map(|one| one.accepted).sum();
        texts.push(format!("{accepted} at {} more", rest.len()));
    }
    texts.join(", ")
}

/// `3 no-header, 1 bad-header`; nothing where all are 0.
fn kinds(counts: &[(&str, u64)]) -> String {
    let counted = counts.iter().filter(|(_, count)| *count > 0);
    let texts: Vec<String> = counted
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    texts.join(", ")
}
