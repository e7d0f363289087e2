//! `demo`: the whole chain in private network namespaces, on the shipped example files.

use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::cli::{DemoArgs, Global};
use crate::config::{self, Configuration};
use crate::demo::namespace::{Isolation, Namespace, isolate};
use crate::demo::programs::{Answer, Sends, ask, start_proxy, start_service};
use crate::model::{ConnmarkMode, ListenAddr, Pathway};
use crate::pathway::{self, Error as PathwayError, Firewall, Options};
use crate::relay::{settings::Settings, tcp::Server, workers::Workers};
use crate::runtime_dir::RuntimeDir;
use crate::socket;

/// The shipped example files, by the names that they get in a configuration directory.
const FILES: [(&str, &str); 3] = [
    (
        "pathways.conf",
        include_str!("../../config/pathways.conf.example"),
    ),
    (
        "instances.tsv",
        include_str!("../../config/instances.tsv.example"),
    ),
    ("allow.txt", include_str!("../../config/allow.txt.example")),
];

const CLIENT: [IpAddr; 2] = both([203, 0, 113, 7], [0x2001, 0xdb8, 7, 0, 0, 0, 0, 7]);
const VPS01: [IpAddr; 2] = both([192, 0, 2, 5], [0x2001, 0xdb8, 5, 0, 0, 0, 0, 5]);
const ROUTER01: [IpAddr; 2] = both([192, 0, 2, 6], [0x2001, 0xdb8, 6, 0, 0, 0, 0, 6]);
// the private network of config/*.example, IPv4 only
const WKS01: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 101, 102, 123));
const VPS01_PRIVATE: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 103, 104, 105));
const ROUTER01_PRIVATE: IpAddr = IpAddr::V4(Ipv4Addr::new(100, 103, 104, 106));

/// Where the proxies listen: for ssh, for the web, and for ssh without a PROXY header.
const SSH: u16 = 22001;
const WEB: u16 = 443;
const PLAIN: u16 = 22;

/// How long a relay of the demonstration waits for the service: long enough for a busy machine, short
/// enough to watch it fail.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);

const fn both(v4: [u8; 4], v6: [u16; 8]) -> [IpAddr; 2] {
    let [a, b, c, d] = v4;
    let [s, t, u, v, w, x, y, z] = v6;
    [
        IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
        IpAddr::V6(Ipv6Addr::new(s, t, u, v, w, x, y, z)),
    ]
}

/// Runs the verb.
pub(super) fn run(_global: &Global, _args: DemoArgs) -> anyhow::Result<ExitCode> {
    let isolation = isolate()?;
    let lab = Lab::build()?;
    let configuration = lab.configure(Path::new("/run/demo/etc"))?;
    let mut out = io::stdout().lock();
    lab.introduce(isolation, &mut out)?;
    let shown = lab.show(&configuration, &mut out)?;
    Ok(if shown {
        writeln!(
            out,
            "\nEvery service saw its real client. The namespaces are gone with this program; nothing \
             on this host was touched."
        )?;
        ExitCode::SUCCESS
    } else {
        writeln!(out, "\nNot every service saw its real client.")?;
        ExitCode::FAILURE
    })
}

/// The four hosts, cabled, with services and proxies running.
struct Lab {
    client: Namespace,
    wks01: Namespace,
}

/// One way from the client to a service.
struct Way {
    proxy: &'static str,
    addresses: [IpAddr; 2],
    port: u16,
    instance: &'static str,
}

const WAYS: [Way; 3] = [
    Way {
        proxy: "vps01, v2",
        addresses: VPS01,
        port: SSH,
        instance: "vps01-ssh",
    },
    Way {
        proxy: "vps01, v2",
        addresses: VPS01,
        port: WEB,
        instance: "vps01-web",
    },
    Way {
        proxy: "router01, v1",
        addresses: ROUTER01,
        port: SSH,
        instance: "router01-ssh",
    },
];

impl Lab {
    fn build() -> anyhow::Result<Self> {
        let client = Namespace::new("client")?;
        let vps01 = Namespace::new("vps01")?;
        let router01 = Namespace::new("router01")?;
        let wks01 = Namespace::new("wks01")?;
        client.cable(&CLIENT, &vps01, &VPS01)?;
        client.cable(&CLIENT, &router01, &ROUTER01)?;
        wks01.cable(&[WKS01], &vps01, &[VPS01_PRIVATE])?;
        wks01.cable(&[WKS01], &router01, &[ROUTER01_PRIVATE])?;
        // as on any real host: a way out that replies could take instead of the pathway
        wks01.default_route(&vps01, WKS01)?;

        let ipv6 = wks01.has_ipv6();
        for port in [22, 443] {
            wks01
                .enter(|| start_service(port, ipv6))?
                .with_context(|| format!("cannot start a service on port {port}"))?;
        }
        for (host, port, upstream, sends) in [
            (&vps01, PLAIN, 22, Sends::Nothing),
            (&vps01, SSH, 2222, Sends::V2),
            (&vps01, WEB, 8443, Sends::V2),
            (&router01, SSH, 2223, Sends::V1),
        ] {
            let upstream = SocketAddr::new(WKS01, upstream);
            host.enter(|| start_proxy(port, ipv6, upstream, sends))?
                .with_context(|| format!("cannot start a proxy on port {port}"))?;
        }
        Ok(Self { client, wks01 })
    }

    fn configure(&self, directory: &Path) -> anyhow::Result<Configuration> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        for (name, text) in FILES {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(config::load_without_environment(directory)?)
    }

    fn introduce(&self, isolation: Isolation, out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "Four hosts, each a network namespace{}, on config/*.example:\n",
            match isolation {
                Isolation::Root => "",
                Isolation::User => " in a user namespace",
            },
        )?;
        let [client, vps01, router01] =
            [CLIENT, VPS01, ROUTER01].map(|pair| pair.map(|address| address.to_string()));
        let wks01 = [WKS01.to_string(), String::new()];
        for (host, [v4, v6], role) in [
            ("client", client, ""),
            ("vps01", vps01, "a proxy, sends PROXY v2"),
            ("router01", router01, "a proxy, sends PROXY v1"),
            ("wks01", wks01, "relays; services on ports 22 and 443"),
        ] {
            let line = format!("  {host:<9} {v4:<15} {v6:<14} {role}");
            writeln!(out, "{}", line.trim_end())?;
        }
        if !self.wks01.has_ipv6() {
            writeln!(out, "\nThis kernel runs without IPv6: IPv4 only.")?;
        }
        Ok(())
    }

    /// The story; whether it ended well.
    fn show(&self, configuration: &Configuration, out: &mut impl Write) -> anyhow::Result<bool> {
        writeln!(out, "\nWithout mmproxyctl the service sees the proxy:\n")?;
        for (client, address) in self.clients(VPS01) {
            let answer = self.ask(address, PLAIN)?;
            let label = format!("{client} -> vps01 -> port 22");
            writeln!(out, "  {label:<58} saw {}", seen(&answer))?;
        }

        let _relays = self.start_relays(configuration)?;
        writeln!(
            out,
            "\nWith relays but without pathways nothing comes back: the service answers to the \
             client,\nand that answer does not reach the relay (it gives up after {CONNECT_TIMEOUT:?}, and logs why):\n"
        )?;
        for (client, address) in self.clients(VPS01) {
            let answer = self.ask(address, SSH)?;
            let label = format!("{client} -> vps01 -> vps01-ssh");
            writeln!(out, "  {label:<58} saw {}", seen(&answer))?;
            ensure!(
                answer.seen.is_none(),
                "the connection came through without a pathway"
            );
        }

        writeln!(out, "\nmmproxyctl pathway add --all\n")?;
        self.install_pathways(&configuration.pathways, out)?;

        writeln!(
            out,
            "\nWith relays and pathways the service sees the client:\n"
        )?;
        let mut all_well = true;
        for way in WAYS {
            let instance = configuration
                .instance(way.instance)
                .with_context(|| format!("no instance {} in the example", way.instance))?;
            for (client, address) in self.clients(way.addresses) {
                let answer = self.ask(address, way.port)?;
                let well = answer.seen == Some(answer.own);
                all_well &= well;
                let mark = instance.mark.map(|mark| format!(" (mark {mark})"));
                let label = format!(
                    "{client} -> {} -> {}{}",
                    way.proxy,
                    way.instance,
                    mark.unwrap_or_default()
                );
                writeln!(
                    out,
                    "  {label:<58} saw {}{}",
                    seen(&answer),
                    if well { "" } else { "   WRONG" }
                )?;
            }
        }
        Ok(all_well)
    }

    /// The client's addresses that can be used here, each with the proxy's of its family.
    fn clients(&self, proxy: [IpAddr; 2]) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        let families = if self.wks01.has_ipv6() { 2 } else { 1 };
        CLIENT.into_iter().zip(proxy).take(families)
    }

    fn ask(&self, address: IpAddr, port: u16) -> anyhow::Result<Answer> {
        let address = SocketAddr::new(address, port);
        self.client
            .enter(|| ask(address))?
            .with_context(|| format!("no answer from {address}"))
    }

    /// The relays end with the worker threads.
    fn start_relays(
        &self,
        configuration: &Configuration,
    ) -> anyhow::Result<(Workers, Vec<Server>)> {
        self.wks01.enter(|| {
            let workers = Workers::start(NonZeroUsize::MIN)?;
            let relays = configuration.instances.iter().map(|instance| {
                let listen = instance.listen.ports();
                let listen = listen.context("the example has no Unix sockets")?.first();
                let listeners = socket::tcp_listeners(ListenAddr::new(listen), NonZeroUsize::MIN)?;
                let mut settings = Settings::of(instance, configuration.allow_list(instance));
                settings.connect_timeout = CONNECT_TIMEOUT;
                Ok(Server::start(&workers, listeners.sockets, settings)?)
            });
            let relays = relays.collect::<anyhow::Result<_>>()?;
            Ok((workers, relays))
        })?
    }

    fn install_pathways(&self, wanted: &[Pathway], out: &mut impl Write) -> anyhow::Result<()> {
        let options = Options {
            dry_run: false,
            runtime_dir: RuntimeDir::resolve(Some("/run/mmproxy".into())),
            lock_timeout: Duration::from_secs(5),
            firewall: Firewall::Auto,
            set_sysctls: false,
        };
        let add = |wanted: &[Pathway]| {
            self.wks01.enter(|| -> anyhow::Result<_> {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()?;
                Ok(runtime.block_on(pathway::add(wanted, &options)))
            })?
        };
        let report = match add(wanted)? {
            Err(error) if is_firewall(&error) => {
                writeln!(
                    out,
                    "  The CONNMARK rules are left out (connmark=off), which targets on loopback \
                     work without: {:#}.\n  With iptables installed they are shown, too.",
                    anyhow::Error::new(error)
                )?;
                let mut wanted = wanted.to_vec();
                for pathway in &mut wanted {
                    pathway.connmark = ConnmarkMode::Off;
                }
                add(&wanted)?
            }
            outcome => outcome,
        }?;
        for note in &report.notes {
            writeln!(out, "  note: {note}")?;
        }
        for change in &report.changes {
            writeln!(out, "  {}", change.command)?;
        }
        Ok(())
    }
}

/// Whether it failed of iptables: not installed, or not usable in a user namespace.
fn is_firewall(error: &PathwayError) -> bool {
    match error {
        PathwayError::Firewall(_) => true,
        PathwayError::Undone { source, .. } => is_firewall(source),
        _ => false,
    }
}

fn seen(answer: &Answer) -> String {
    match answer.seen {
        Some(seen) => seen.to_string(),
        None => "nothing".to_owned(),
    }
}
