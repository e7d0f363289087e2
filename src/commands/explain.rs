//! `explain`: which way a client's connection came, for an address in a service's log.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use super::ask::Processes;
use super::output::{print_json, results};
use super::units::{bytes, span};
use crate::cli::{ExplainArgs, Global};
use crate::control::messages::Request;
use crate::overview::Explanation;
use crate::relay::view::{Connection, Filter, Stage};

/// Runs the verb.
pub(super) fn run(global: &Global, args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let filter = Filter {
        client: Some(args.client.prefix),
        client_port: args.client.port,
        ..Filter::default()
    };
    let answers: Vec<Explanation> = Processes::find(global)?.ask(&Request::Explain { filter })?;
    let mut all = Explanation {
        open: Vec::new(),
        ended: Vec::new(),
    };
    for answer in answers {
        all.open.extend(answer.open);
        all.ended.extend(answer.ended);
    }
    let found = all.open.len() + all.ended.len();
    if args.json {
        print_json(&all)?;
    } else if found == 0 {
        writeln!(
            results(),
            "no connection of this client is open or remembered: it did not come through a relay of this \
             host, or too long ago"
        )?;
    } else {
        let blocks: Vec<String> = all.open.iter().chain(&all.ended).map(block).collect();
        results().write_all(blocks.join("\n").as_bytes())?;
    }
    Ok(if found == 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn block(one: &Connection) -> String {
    let client = one
        .client
        .map_or_else(|| "a client".to_owned(), |client| client.to_string());
    let state = match (&one.ended, one.stage) {
        (Some(ended), _) => format!(
            "ended {} ago after {}: {}",
            span(ended.ago_ms),
            span(one.age_ms),
            ended.reason
        ),
        (None, Stage::Relaying) => {
            format!(
                "open for {}, idle for {}",
                span(one.age_ms),
                span(one.idle_ms)
            )
        }
        (None, stage) => format!("{} for {}", stage.name(), span(one.age_ms)),
    };
    let mut text = format!("{client}  {state}\n");
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "  {name:<9} {value}");
    };
    line(
        "instance",
        &match one.mark {
            0 => format!("{}, no mark", one.instance),
            mark => format!("{}, pathway mark {mark}", one.instance),
        },
    );
    if let Some(port) = one.port {
        line("port", &port.to_string());
    }
    let header = one
        .header
        .map(|header| format!(", {header}"))
        .unwrap_or_default();
    line("proxy", &format!("{}{header}", one.proxy));
    if let (Some(local), Some(target)) = (one.local, one.target) {
        let mut socket = format!("{local} to {target}");
        if one
            .client
            .is_some_and(|client| client.port() != local.port())
        {
            socket.push_str(", the client's port was taken");
        }
        line("socket", &socket);
    }
    if let Some(id) = &one.unique_id {
        line("unique id", id);
    }
    if let Some(name) = &one.authority {
        line("authority", &name.escape_debug().to_string());
    }
    line(
        "bytes",
        &format!(
            "{} to the target, {} to the client",
            bytes(one.bytes_to_target),
            bytes(one.bytes_to_client)
        ),
    );
    text
}
