//! `probe --udp`: be a proxy that sends datagrams.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::cli::{Global, HeaderForm, ProbeArgs};
use crate::commands::UsageError;
use crate::relay::spp;

/// The most payload and header together that IPv4 carries.
const MAX_DATAGRAM: usize = 65_507;

/// Sends stdin, waits for as many answers as there were datagrams, at most the time allowed.
pub(super) fn run(global: &Global, args: &ProbeArgs, header: &[u8]) -> anyhow::Result<ExitCode> {
    let mut stdin = Vec::new();
    io::stdin()
        .lock()
        .read_to_end(&mut stdin)
        .context("cannot read stdin")?;
    let datagrams = datagrams(args, header, &stdin)?;
    let socket = connect(args.relay, args.source)?;
    let local = socket.local_addr().context("cannot read the own address")?;
    for datagram in &datagrams {
        socket
            .send(datagram)
            .map_err(|error| failed(args.relay, error))?;
    }
    if global.verbose > 0 {
        eprintln!(
            "{local} -> {}: {} datagrams, header of {} bytes: {}",
            args.relay,
            datagrams.len(),
            header.len(),
            header.escape_ascii()
        );
    }
    // a header alone opens a flow, and nothing answers it
    let expected = if stdin.is_empty() { 0 } else { datagrams.len() };
    let answered = receive(&socket, args, header, expected)?;
    if answered == 0 && expected > 0 {
        bail!(
            "no answer from {} within {:?}: the relay refused (its log tells), or the service is silent",
            args.relay,
            args.timeout
        );
    }
    if answered < expected && !global.quiet {
        eprintln!("note: {answered} answers to {expected} datagrams");
    }
    Ok(ExitCode::SUCCESS)
}

/// Stdin as datagrams, with the header where such a sender has it.
fn datagrams(args: &ProbeArgs, header: &[u8], stdin: &[u8]) -> Result<Vec<Vec<u8>>, UsageError> {
    let payloads: Vec<&[u8]> = if args.lines {
        stdin
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| line.strip_suffix(b"\n").unwrap_or(line))
            .collect()
    } else {
        vec![stdin]
    };
    let mut datagrams: Vec<Vec<u8>> = payloads
        .iter()
        .enumerate()
        .map(|(number, payload)| match args.first && number > 0 {
            true => payload.to_vec(),
            false => [header, payload].concat(),
        })
        .collect();
    if datagrams.is_empty() {
        datagrams.push(header.to_vec());
    }
    match datagrams.iter().map(Vec::len).max() {
        Some(longest) if longest > MAX_DATAGRAM => Err(UsageError(format!(
            "a datagram of {longest} bytes with its header: at most {MAX_DATAGRAM} fit"
        ))),
        _ => Ok(datagrams),
    }
}

fn connect(relay: SocketAddr, source: Option<IpAddr>) -> anyhow::Result<UdpSocket> {
    let source = match source {
        Some(source) if source.is_ipv4() != relay.is_ipv4() => {
            return Err(UsageError(format!(
                "--source {source} and the relay {relay} are not of one family"
            ))
            .into());
        }
        Some(source) => source,
        None if relay.is_ipv4() => Ipv4Addr::UNSPECIFIED.into(),
        None => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((source, 0))
        .with_context(|| format!("cannot send from {source}: is it an address of this host?"))?;
    socket
        .connect(relay)
        .with_context(|| format!("cannot send to {relay}"))?;
    Ok(socket)
}

/// Writes answers to stdout until as many came as expected, or the time is over; how many came.
fn receive(
    socket: &UdpSocket,
    args: &ProbeArgs,
    header: &[u8],
    expected: usize,
) -> anyhow::Result<usize> {
    let end = Instant::now() + args.timeout;
    let mut stdout = io::stdout().lock();
    let mut buffer = vec![0; 1 << 16];
    let mut answered = 0;
    while answered < expected {
        let left = end.saturating_duration_since(Instant::now());
        // a timeout of zero would mean none at all
        socket
            .set_read_timeout(Some(left.max(Duration::from_millis(1))))
            .context("cannot set a time limit")?;
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) => match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Ok(answered),
                _ => return Err(failed(args.relay, error)),
            },
        };
        let mut answer = &buffer[..length];
        if args.version == Some(HeaderForm::Spp) {
            answer = match answer.split_at_checked(spp::LENGTH) {
                Some((own, payload)) if own == header => payload,
                _ => bail!(
                    "the answer does not begin with the header that was sent: {}",
                    answer[..length.min(spp::LENGTH)].escape_ascii()
                ),
            };
        }
        answered += 1;
        let line_end: &[u8] = if args.lines { b"\n" } else { b"" };
        let written = stdout
            .write_all(answer)
            .and_then(|()| stdout.write_all(line_end))
            .and_then(|()| stdout.flush());
        match written {
            Ok(()) => {}
            // the reader of our output has seen enough
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(answered),
            Err(error) => return Err(error).context("cannot write to stdout"),
        }
    }
    Ok(answered)
}

fn failed(relay: SocketAddr, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            anyhow::anyhow!("{relay} refused the datagram: nothing listens there")
        }
        _ => anyhow::Error::new(error).context(format!("cannot exchange datagrams with {relay}")),
    }
}
