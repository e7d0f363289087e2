//! `top`: instances and connections live in the terminal.
//!
//! Owns: the loop of looking, drawing and keys. What is shown comes from [`model`], how it looks from [`draw`].

mod draw;
mod model;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::ask::Processes;
use crate::cli::{Global, TopArgs};
use crate::control::messages::{Conns, Request};
use crate::overview::{Listing, Sort};
use model::{Model, Reading};

/// How many connections are asked for: those that moved last. More fit on no screen.
const CONNECTIONS: usize = 500;

/// Runs the verb.
pub(super) fn run(global: &Global, args: &TopArgs) -> anyhow::Result<ExitCode> {
    if !io::stdout().is_terminal() {
        bail!("top needs a terminal: status --watch writes to anything");
    }
    // what is wrong from the beginning is better said on an ordinary screen
    let mut model = Model::default();
    model.take(look(global, args)?);
    let mut terminal = ratatui::try_init().context("cannot set up the terminal")?;
    let outcome = watch(&mut terminal, global, args, &mut model);
    ratatui::try_restore().context("cannot restore the terminal")?;
    outcome.map(|()| ExitCode::SUCCESS)
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    global: &Global,
    args: &TopArgs,
    model: &mut Model,
) -> anyhow::Result<()> {
    let interval = args.interval.max(Duration::from_millis(100));
    let mut next = Instant::now() + interval;
    loop {
        terminal
            .draw(|frame| draw::draw(frame, model))
            .context("cannot draw")?;
        let wait = next.saturating_duration_since(Instant::now());
        if event::poll(wait).context("cannot read keys")? {
            match event::read().context("cannot read keys")? {
                Event::Key(key)
                    if key.kind != KeyEventKind::Release && press(model, key) == Pressed::Quit =>
                {
                    return Ok(());
                }
                // anything else, a new size above all, is a reason to draw
                _ => {}
            }
            continue;
        }
        next = Instant::now() + interval;
        if model.paused {
            continue;
        }
        match look(global, args) {
            Ok(reading) => model.take(reading),
            // a restart is what one watches for
            Err(error) => model.lost(format!("{error:#}")),
        }
    }
}

fn look(global: &Global, args: &TopArgs) -> anyhow::Result<Reading> {
    let mut all = Processes::find(global)?;
    let processes = all.status(&args.instances)?;
    let listings: Vec<Listing> = all.ask(&Request::Conns(Conns {
        instances: args.instances.clone(),
        sort: Sort::Moved,
        limit: Some(CONNECTIONS),
        ..Conns::default()
    }))?;
    Ok(Reading {
        at: Instant::now(),
        processes,
        connections: listings
            .into_iter()
            .flat_map(|listing| listing.connections)
            .collect(),
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Pressed {
    Known,
    Quit,
}

fn press(model: &mut Model, key: KeyEvent) -> Pressed {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return Pressed::Quit,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
            return Pressed::Quit;
        }
        KeyCode::Char('p' | ' ') => model.paused = !model.paused,
        KeyCode::Char('s') => model.next_order(),
        KeyCode::Enter => model.toggle_only(),
        KeyCode::Down | KeyCode::Char('j') => model.select(1),
        KeyCode::Up | KeyCode::Char('k') => model.select(-1),
        KeyCode::PageDown => model.select(10),
        KeyCode::PageUp => model.select(-10),
        _ => {}
    }
    Pressed::Known
}
