//! `probe`: be the proxy. Connects, sends a header, then passes stdin and stdout.

mod header;
mod udp;

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use socket2::{Domain, Protocol, Socket, Type};

use super::UsageError;
use crate::cli::{Corruption, Global, ProbeArgs};
use crate::config;
use crate::model::Instance;

/// Runs the verb.
pub(super) fn run(global: &Global, args: ProbeArgs) -> anyhow::Result<ExitCode> {
    let header = header::build(&args)?;
    if !global.quiet {
        note_of_wrong_side(global, args.relay);
    }
    if args.udp {
        return udp::run(global, &args, &header);
    }
    let pieces = split(&header, args.split.get())?;
    let stream = connect(args.relay, args.source, args.timeout)?;
    let local = stream.local_addr().context("cannot read the own address")?;
    send(&stream, &pieces, args.split_delay).with_context(|| {
        format!(
            "{} closed the connection while the header was sent: is {} in its allow list?",
            args.relay,
            local.ip()
        )
    })?;
    if global.verbose > 0 {
        eprintln!(
            "{local} -> {}: header of {} bytes: {}",
            args.relay,
            header.len(),
            header.escape_ascii()
        );
    }

    let received = if args.corrupt == Some(Corruption::Truncated) {
        stream
            .shutdown(Shutdown::Write)
            .context("cannot send the end")?;
        let ended = OnceLock::from(Instant::now());
        receive(&stream, &ended, args.timeout)
    } else {
        exchange(&stream, args.timeout)
    };
    match received {
        Ok(0) if !global.quiet => {
            eprintln!(
                "note: {} closed without a byte: the service had nothing to say, or the relay refused (its log tells)",
                args.relay
            );
        }
        Ok(_) => {}
        Err(End::Silent) => bail!(
            "no answer from {} within {:?}: the relay waits for more, or the service is silent",
            args.relay,
            args.timeout
        ),
        Err(End::Reset(0)) => bail!(
            "{} reset the connection before it sent a byte: the relay refused the header or could not reach the service",
            args.relay
        ),
        Err(End::Reset(bytes)) => bail!("{} reset the connection after {bytes} bytes", args.relay),
        Err(End::Failed(error)) => return Err(error),
    }
    Ok(ExitCode::SUCCESS)
}

/// What is routed to this host arrives from elsewhere only: this host itself sends it on to the router.
fn note_of_wrong_side(global: &Global, relay: SocketAddr) {
    // a probe needs no configuration, and one with mistakes is not its affair
    let Ok(files) = config::load_pathways(&global.config_dir) else {
        return;
    };
    let takes = |instance: &&Instance| {
        let taken = instance.interception().map(|one| one.listen);
        taken.is_some_and(|listen| {
            listen.network().contains(&relay.ip()) && listen.ports().contains(relay.port())
        })
    };
    if let Some(instance) = files.instances.iter().find(takes) {
        eprintln!(
            "note: {} takes what is routed to this host for {}, which nothing from this host itself is: \
             probe it from the proxy's host",
            instance.name, instance.listen
        );
    }
}

/// Why receiving ended before the other end was done.
enum End {
    /// Nothing came, in all of the time allowed.
    Silent,
    /// A reset, after so many bytes.
    Reset(u64),
    /// Anything else.
    Failed(anyhow::Error),
}

fn connect(
    relay: SocketAddr,
    source: Option<IpAddr>,
    limit: Duration,
) -> anyhow::Result<TcpStream> {
    if let Some(source) = source
        && source.is_ipv4() != relay.is_ipv4()
    {
        return Err(UsageError(format!(
            "--source {source} and the relay {relay} are not of one family"
        ))
        .into());
    }
    let socket = Socket::new(
        Domain::for_address(relay),
        Type::STREAM,
        Some(Protocol::TCP),
    )
    .context("cannot open a socket")?;
    if let Some(source) = source {
        socket
            .bind(&SocketAddr::new(source, 0).into())
            .with_context(|| {
                format!("cannot connect from {source}: is it an address of this host?")
            })?;
    }
    socket
        .connect_timeout(&relay.into(), limit)
        .map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionRefused => {
                anyhow::anyhow!("{relay} refused the connection: nothing listens there")
            }
            io::ErrorKind::TimedOut => {
                anyhow::anyhow!("{relay} did not take the connection within {limit:?}")
            }
            _ => anyhow::Error::new(error).context(format!("cannot connect to {relay}")),
        })?;
    // each write is a segment of its own
    socket
        .set_tcp_nodelay(true)
        .context("cannot set TCP_NODELAY")?;
    Ok(socket.into())
}

/// As many parts of about the same length as asked for.
fn split(header: &[u8], pieces: usize) -> Result<Vec<&[u8]>, UsageError> {
    if pieces > header.len().max(1) {
        return Err(UsageError(format!(
            "a header of {} bytes has no {pieces} pieces: --split takes 1 to {}",
            header.len(),
            header.len().max(1)
        )));
    }
    let at = |piece: usize| header.len() * piece / pieces;
    Ok((0..pieces)
        .map(|piece| &header[at(piece)..at(piece + 1)])
        .collect())
}

fn send(mut stream: &TcpStream, pieces: &[&[u8]], pause: Duration) -> io::Result<()> {
    for (number, piece) in pieces.iter().enumerate() {
        if number > 0 {
            std::thread::sleep(pause);
        }
        stream.write_all(piece)?;
    }
    Ok(())
}

/// Passes stdin on and answers to stdout until the other end closes; the number of bytes received.
fn exchange(stream: &TcpStream, limit: Duration) -> Result<u64, End> {
    let ended = Arc::new(OnceLock::new());
    let (sender, at) = (
        stream
            .try_clone()
            .context("cannot duplicate the socket")
            .map_err(End::Failed)?,
        Arc::clone(&ended),
    );
    // never joined: the other end may close while stdin stays open, and the process ends then
    std::thread::spawn(move || {
        // what goes wrong here, the receiving side hears of from the kernel
        let _ = io::copy(&mut io::stdin().lock(), &mut &sender);
        let _ = sender.shutdown(Shutdown::Write);
        at.get_or_init(Instant::now);
    });
    receive(stream, &ended, limit)
}

/// Writes what comes to stdout. `ended` is when the last byte was sent, from where `limit` counts.
fn receive(mut stream: &TcpStream, ended: &OnceLock<Instant>, limit: Duration) -> Result<u64, End> {
    /// How often silence is looked at; the time limit is kept to this.
    const TICK: Duration = Duration::from_millis(50);

    let timer = |tick| {
        stream
            .set_read_timeout(tick)
            .context("cannot set a time limit")
            .map_err(End::Failed)
    };
    timer(Some(TICK.min(limit)))?;
    let mut stdout = io::stdout().lock();
    let mut buffer = [0; 64 * 1024];
    let mut received = 0;
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return Ok(received),
            Ok(length) => length,
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                    if ended.get().is_some_and(|ended| ended.elapsed() >= limit) {
                        return Err(End::Silent);
                    }
                    continue;
                }
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    return Err(End::Reset(received));
                }
                _ => {
                    return Err(End::Failed(
                        anyhow::Error::new(error).context("cannot receive"),
                    ));
                }
            },
        };
        if received == 0 {
            // it answers: from here on it may take its time
            timer(None)?;
        }
        received += length as u64;
        let written = stdout
            .write_all(&buffer[..length])
            .and_then(|()| stdout.flush());
        match written {
            Ok(()) => {}
            // the reader of our output has seen enough
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(received),
            Err(error) => {
                return Err(End::Failed(
                    anyhow::Error::new(error).context("cannot write to stdout"),
                ));
            }
        }
    }
}
