//! `conns`: open connections as a list, and the end of some of them.

use std::io::Write;
use std::process::ExitCode;

use comfy_table::CellAlignment;

use super::UsageError;
use super::ask::{Processes, filter};
use super::output::{print_json, results, table, trimmed};
use super::units::{bytes, span};
use crate::cli::{ConnsAction, ConnsCommand, ConnsKillArgs, ConnsListArgs, Global};
use crate::control::messages::{Conns, Request};
use crate::overview::{Listing, Sort};
use crate::relay::view::{Connection, HeaderKind, Stage};

/// Runs the verb.
pub(super) fn run(global: &Global, command: ConnsCommand) -> anyhow::Result<ExitCode> {
    match command.action {
        None => list(global, &command.list),
        Some(ConnsAction::Kill(args)) => kill(global, &args),
    }
}

fn list(global: &Global, args: &ConnsListArgs) -> anyhow::Result<ExitCode> {
    let mut processes = Processes::find(global)?;
    processes.check_names(&args.which.instances)?;
    let wanted = Conns {
        instances: args.which.instances.clone(),
        filter: filter(&args.which)?,
        sort: args.sort,
        limit: args.limit,
    };
    let listings = processes.ask(&Request::Conns(wanted))?;
    let listing = together(listings, args.sort, args.limit);
    if args.json {
        print_json(&listing)?;
        return Ok(ExitCode::SUCCESS);
    }
    let shown = listing.connections.len();
    let mut out = results();
    if shown > 0 {
        writeln!(out, "{}", rows(&listing.connections))?;
    }
    match listing.total {
        0 => writeln!(out, "no such connection is open")?,
        total if total > shown => writeln!(out, "and {} more", total - shown)?,
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// The listings of several processes as one.
fn together(listings: Vec<Listing>, sort: Sort, limit: Option<usize>) -> Listing {
    let total = listings.iter().map(|listing| listing.total).sum();
    let mut connections: Vec<Connection> = listings
        .into_iter()
        .flat_map(|listing| listing.connections)
        .collect();
    sort.sort(&mut connections);
    connections.truncate(limit.unwrap_or(usize::MAX));
    Listing { total, connections }
}

fn rows(connections: &[Connection]) -> String {
    let mut rows = table([
        "INSTANCE", "PORT", "CLIENT", "PROXY", "TARGET", "AGE", "IDLE", "IN", "OUT", "V", "",
    ]);
    for column in 5..9 {
        if let Some(column) = rows.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for one in connections {
        let unknown = || "-".to_owned();
        rows.add_row([
            one.instance.clone(),
            one.port.map_or_else(unknown, |port| port.to_string()),
            one.client.map_or_else(unknown, |client| client.to_string()),
            one.proxy.to_string(),
            one.target.map_or_else(unknown, |target| target.to_string()),
            span(one.age_ms),
            span(one.idle_ms),
            bytes(one.bytes_to_target),
            bytes(one.bytes_to_client),
            match one.header {
                Some(HeaderKind::Proxy(version)) => version.to_string(),
                Some(other) => other.to_string(),
                None => unknown(),
            },
            remarks(one),
        ]);
    }
    trimmed(&rows)
}

/// What only some connections have.
pub(super) fn remarks(one: &Connection) -> String {
    let mut remarks = Vec::new();
    match one.stage {
        Stage::Header => remarks.push("no header yet".to_owned()),
        Stage::Connecting => remarks.push("connecting".to_owned()),
        Stage::Relaying => {}
    }
    if let (Some(client), Some(local)) = (one.client, one.local)
        && client.port() != local.port()
    {
        remarks.push(format!("as port {}", local.port()));
    }
    if let Some(id) = &one.unique_id {
        remarks.push(format!("id {id}"));
    }
    if let Some(name) = &one.authority {
        // whatever a client asked for: it shall not reach the terminal as it is
        remarks.push(format!("for {}", name.escape_debug()));
    }
    remarks.join(", ")
}

fn kill(global: &Global, args: &ConnsKillArgs) -> anyhow::Result<ExitCode> {
    let mut filter = filter(&args.which)?;
    filter.id = args.id;
    let instances = args.which.instances.clone();
    if filter.is_everything() && instances.is_empty() && !args.all {
        return Err(UsageError(
            "which connections? name instances, --client, --proxy, --idle or --id, or say --all"
                .to_owned(),
        )
        .into());
    }
    let mut processes = Processes::find(global)?;
    processes.check_names(&instances)?;
    let listings = processes.ask(&Request::ConnsKill { instances, filter })?;
    let listing = together(listings, Sort::default(), None);
    if args.json {
        print_json(&listing)?;
    } else {
        let mut out = results();
        if !listing.connections.is_empty() {
            writeln!(out, "{}", rows(&listing.connections))?;
        }
        match listing.total {
            0 => writeln!(out, "no such connection is open")?,
            1 => writeln!(out, "1 connection ended")?,
            many => writeln!(out, "{many} connections ended")?,
        }
    }
    // whoever meant somebody wants to know that there was nobody
    Ok(if listing.total == 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}
