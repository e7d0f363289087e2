//! What can go wrong on a host, each as the commands that make it so: for `doctor --demo`, and for the tests
//! that print the table of docs/doctor.md.
//!
//! Must not know: how a fault is recognised.

use std::io;
use std::net::SocketAddr;

use super::Error;

/// One way to break a host that works.
#[derive(Debug, Clone, Default)]
pub struct Ill {
    /// What is done, in words.
    pub what: String,
    /// What the doctor is to call it.
    pub fault: &'static str,
    /// The instances that the doctor is asked about.
    pub ask: &'static str,
    /// Done before the pathways are put in place: other configuration.
    pub before: String,
    /// Services of wks01 that are not there.
    pub without: Vec<Service>,
    /// Services of wks01 that are there.
    pub with: Vec<Service>,
    /// Programs that run all the while.
    pub daemons: Vec<String>,
    /// What breaks it.
    pub inject: String,
    /// Words before `mmproxyctl doctor`, while it is broken.
    pub under: &'static str,
    /// How it is mended.
    pub remedy: Remedy,
}

/// A service of wks01.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Service {
    /// UDP rather than TCP.
    pub udp: bool,
    /// Where.
    pub address: &'static str,
}

impl Service {
    /// The address as a value.
    pub(super) fn socket(self) -> Result<SocketAddr, Error> {
        self.address.parse().map_err(|error| Error::System {
            operation: format!("read the address {}", self.address),
            source: io::Error::other(error),
        })
    }
}

/// How a host is mended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Remedy {
    /// With the commands that the doctor prints.
    #[default]
    Printed,
    /// The doctor's advice is no command; this is what it says.
    Advised(&'static str),
    /// By starting a service.
    Start(Service),
    /// By asking without what was put before the command.
    AskAgain,
}

fn ill(fault: &'static str, ask: &'static str, what: &str, inject: &str) -> Ill {
    Ill {
        what: what.to_owned(),
        fault,
        ask,
        inject: inject.to_owned(),
        ..Ill::default()
    }
}

const fn tcp(address: &'static str) -> Service {
    Service {
        udp: false,
        address,
    }
}

const fn udp(address: &'static str) -> Service {
    Service { udp: true, address }
}

/// All of them.
pub fn all() -> Vec<Ill> {
    let mut all = pieces();
    all.extend(routing());
    all.extend(marks());
    all.extend(firewalls());
    all.extend(switches());
    all.extend(services());
    all.extend(relays());
    all.extend(programs());
    all
}

/// Every single piece of a pathway, one at a time.
fn pieces() -> Vec<Ill> {
    let mut all = Vec::new();
    for (ip, iptables, family, loopback, others) in [
        (
            "ip",
            "iptables",
            "IPv4",
            "127.0.0.0/8",
            ["10.0.0.2", "172.20.0.2", "10.9.0.2"],
        ),
        (
            "ip -6",
            "ip6tables",
            "IPv6",
            "::1",
            ["fd00::2", "fd00:20::2", "fd00:9::2"],
        ),
    ] {
        let mut piece = |ask, what: &str, inject: &str| {
            all.push(ill("pathway-piece-missing", ask, what, inject));
        };
        let mut rule = |ask, priority: u32, from: &str| {
            let inject = format!("{ip} rule del priority {priority} from {from}");
            piece(ask, &format!("`{inject}`"), &inject);
        };
        rule("local", 100, loopback);
        rule("local", 200, loopback);
        for (ask, from) in ["own", "container", "routed"].into_iter().zip(others) {
            rule(ask, 100, from);
        }
        for priority in [101, 102, 103] {
            let inject = format!("{ip} rule del priority {priority}");
            piece("container", &format!("`{inject}`"), &inject);
        }
        let inject = format!("{ip} route del local default dev lo table 123");
        piece("local", &format!("`{inject}`"), &inject);
        for (ask, chain, number, name) in [
            ("own", "OUTPUT", 1, "save"),
            ("own", "OUTPUT", 2, "restore in OUTPUT"),
            ("container", "PREROUTING", 1, "restore in PREROUTING"),
        ] {
            piece(
                ask,
                &format!("the {family} CONNMARK {name} is deleted"),
                &format!("{iptables} -t mangle -D {chain} {number}"),
            );
        }
    }
    all.push(ill(
        "pathway-piece-missing",
        "container container-udp",
        "`iptables -t mangle -F`",
        "iptables -t mangle -F",
    ));
    all
}

fn routing() -> Vec<Ill> {
    vec![
        Ill {
            before: "echo '123 priority=6000' >\"$DIR/etc/pathways.conf\"".to_owned(),
            ..ill(
                "priority-behind-foreign-rules",
                "local",
                "`priority=6000`, and a VPN's rules at 5210 and 5270 (Tailscale)",
                "ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
                 ip rule add priority 5270 lookup 52
                 ip route add 100.64.0.0/10 via 10.0.0.1 table 52",
            )
        },
        ill(
            "foreign-rule-shadows",
            "own",
            "a rule at priority 50 sends everything to another table",
            "ip route add default via 10.0.0.1 table 77
             ip rule add priority 50 lookup 77",
        ),
        ill(
            "foreign-rule-shadows",
            "own",
            "the same for IPv6",
            "ip -6 route add default via fd00::1 table 77
             ip -6 rule add priority 50 lookup 77",
        ),
        ill(
            "table-taken",
            "local",
            "another program puts a route into the pathway's table",
            "ip route add 198.51.100.0/24 via 10.0.0.1 table 123",
        ),
        ill(
            "no-default-route",
            "own",
            "`ip route del default`",
            "ip route del default",
        ),
        ill(
            "no-default-route",
            "own",
            "`ip -6 route del default`",
            "ip -6 route del default",
        ),
        ill(
            "route-localnet",
            "local",
            "`route_localnet` is switched on later",
            "sysctl -qw net.ipv4.conf.all.route_localnet=1",
        ),
        ill(
            "no-way-back",
            "routed",
            "the target's default gateway is another host",
            "nsenter --net=\"$ROUTED\" ip route replace default via 10.9.0.9",
        ),
        ill(
            "no-way-back",
            "routed",
            "the same for IPv6",
            "nsenter --net=\"$ROUTED\" ip -6 route replace default via fd00:9::9",
        ),
    ]
}

fn marks() -> Vec<Ill> {
    let marked = |mark: u32, what: &str, inject: &str| Ill {
        before: format!(
            "sed -i 's/^123/{mark}/' \"$DIR/etc/pathways.conf\"; sed -i 's/\\t123\\t/\\t{mark}\\t/' \"$DIR/etc/instances.tsv\""
        ),
        ..ill(
            "mark-overlap",
            "local",
            &format!("mark {mark} beside {what}"),
            inject,
        )
    };
    vec![
        marked(
            300,
            "Tailscale (0xff0000)",
            "iptables -N ts-forward; iptables -A FORWARD -j ts-forward
             iptables -A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
             iptables -A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT",
        ),
        marked(
            300,
            "kube-proxy (0x4000)",
            "iptables -t nat -N KUBE-MARK-MASQ; iptables -t nat -A PREROUTING -p tcp --dport 30080 -j KUBE-MARK-MASQ
             iptables -t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
        ),
        marked(
            33_000,
            "kube-proxy (0x8000)",
            "iptables -N KUBE-FIREWALL; iptables -A FORWARD -j KUBE-FIREWALL
             iptables -A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP",
        ),
        marked(
            300,
            "Calico (0xffff0000)",
            "iptables -t mangle -N cali-PREROUTING; iptables -t mangle -A PREROUTING -j cali-PREROUTING
             iptables -t mangle -A cali-PREROUTING -i cali+ -j MARK --set-xmark 0x10000/0x10000",
        ),
        marked(
            515,
            "Cilium (0xf00)",
            "ip route add local default dev lo table 2004
             ip rule add priority 9 fwmark 0x200/0xf00 lookup 2004",
        ),
        marked(
            1337,
            "Istio (0x539)",
            "iptables -t mangle -N ISTIO_DIVERT; iptables -t mangle -A PREROUTING -i ens9 -j ISTIO_DIVERT
             iptables -t mangle -A ISTIO_DIVERT -j MARK --set-mark 1337",
        ),
        marked(
            257,
            "Docker's ingress (0x101)",
            "iptables -t mangle -N DOCKER-INGRESS; iptables -t mangle -A PREROUTING -i docker_gwbridge -j DOCKER-INGRESS
             iptables -t mangle -A DOCKER-INGRESS -j MARK --set-mark 0x101",
        ),
    ]
}

fn firewalls() -> Vec<Ill> {
    let drops = |ask, what: &str, inject: &str| ill("firewall-drop", ask, what, inject);
    vec![
        Ill {
            before: "echo 100.103.104.105 >>\"$DIR/etc/allow.txt\"".to_owned(),
            ..drops(
                "local",
                "`ts-input` drops 100.64.0.0/10 that does not come from tailscale0",
                "iptables -N ts-input; iptables -I INPUT -j ts-input
                 iptables -A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP",
            )
        },
        drops(
            "local",
            "iptables drops outside addresses on lo",
            "iptables -A INPUT -i lo ! -s 127.0.0.0/8 -j DROP",
        ),
        drops(
            "local",
            "ip6tables drops outside addresses on lo",
            "ip6tables -A INPUT -i lo ! -s ::1 -j DROP",
        ),
        drops(
            "local",
            "nftables drops outside addresses on lo, without a counter",
            "nft 'table inet guard { chain input { type filter hook input priority 0; iifname lo ip saddr != 127.0.0.0/8 drop; }; }'",
        ),
        drops(
            "local",
            "the policy of INPUT is DROP, with loopback addresses accepted",
            "iptables -A INPUT -s 127.0.0.0/8 -d 127.0.0.0/8 -j ACCEPT; iptables -P INPUT DROP",
        ),
        drops(
            "own",
            "OUTPUT drops what has a foreign source",
            "iptables -A OUTPUT ! -s 10.0.0.0/8 -d 10.0.0.2 -j REJECT",
        ),
        drops(
            "container",
            "iptables drops what comes in on the bridge for others",
            "iptables -A INPUT -i br0 ! -d 172.20.0.1 -j DROP",
        ),
        drops(
            "container",
            "a bridge table drops what is for others",
            "nft 'table bridge guard { chain input { type filter hook input priority 0; ip daddr != 172.20.0.1 drop; }; }'",
        ),
        drops(
            "container-udp",
            "iptables drops UDP and ICMP that come in on the bridge for others",
            "iptables -A INPUT -i br0 ! -d 172.20.0.1 -j DROP",
        ),
        ill(
            "not-tracked",
            "own",
            "NOTRACK in the raw table",
            "iptables -t raw -A OUTPUT -p tcp -j NOTRACK; iptables -t raw -A PREROUTING -p tcp -j NOTRACK",
        ),
        ill(
            "not-tracked",
            "container",
            "`notrack` in nftables, for the answers only",
            "nft 'table ip guard { chain early { type filter hook prerouting priority raw; ip saddr 172.20.0.2 notrack; }; }'",
        ),
    ]
}

fn switches() -> Vec<Ill> {
    vec![
        ill(
            "rp-filter",
            "routed",
            "answers come in by another interface, and `rp_filter=1` there",
            "ip link add eth2 type veth peer name eth1 netns $ROUTED
             ip address add 10.10.0.1/24 dev eth2; ip link set eth2 up
             nsenter --net=\"$ROUTED\" sh -ec 'ip address add 10.10.0.2/24 dev eth1; ip link set eth1 up; ip route replace default via 10.10.0.1'
             nsenter --net=\"$ROUTED\" ip neighbour add 10.10.0.1 dev eth1 lladdr $(ip -br link show eth2 | awk '{ print $3 }')
             sysctl -qw net.ipv4.conf.eth2.rp_filter=1
             tries=0; until ip link show eth2 | grep -q LOWER_UP; do tries=$((tries + 1)); [ $tries -lt 200 ]; sleep 0.02; done",
        ),
        Ill {
            before: "printf 'marked\\t123\\t10.0.0.2:2211\\t10.11.0.2\\t8080\\t-\\n' >>\"$DIR/etc/instances.tsv\"".to_owned(),
            ..ill(
                "src-valid-mark",
                "marked",
                "only marked packets are routed to the target, `rp_filter=1` and `src_valid_mark=0`",
                "nsenter --net=\"$ROUTED\" ip address add 10.11.0.2/32 dev lo
                 ip route add 10.11.0.2 via 10.9.0.2 table 300
                 ip rule add priority 300 fwmark 123/0xff lookup 300
                 sysctl -qw net.ipv4.conf.eth1.rp_filter=1",
            )
        },
        ill(
            "ipv6-disabled",
            "local",
            "`net.ipv6.conf.all.disable_ipv6=1`",
            "sysctl -qw net.ipv6.conf.all.disable_ipv6=1",
        ),
        Ill {
            daemons: vec![spoofer()],
            ..ill(
                "ports-exhausted",
                "local",
                "spoofed sockets are bound to every port of `ip_local_port_range`",
                "sysctl -qw net.ipv4.ip_local_port_range='40000 40015'
                 touch \"$DIR/go\"; tries=0; until [ -e \"$DIR/gone\" ]; do tries=$((tries + 1)); [ $tries -lt 500 ]; sleep 0.02; done",
            )
        },
        ill(
            "listen-address-absent",
            "local",
            "the listen address is on no interface",
            "sed -i 's/10.0.0.2:2201/100.101.102.123:2201/' \"$DIR/etc/instances.tsv\"",
        ),
    ]
}

/// What a relay on an old kernel does: `bind()` to each client's port, then connect.
fn spoofer() -> String {
    "exec perl -MSocket -e '
        my $dir = $ENV{DIR}; select(undef, undef, undef, 0.02) until -e \"$dir/go\";
        for my $port (40000 .. 40015) {
            socket(my $s, PF_INET, SOCK_STREAM, 0) or die $!;
            setsockopt($s, 0, 19, 1) or die $!;
            setsockopt($s, SOL_SOCKET, 36, 123) or die $!;
            bind($s, pack_sockaddr_in($port, inet_aton(\"198.51.100.7\"))) or die $!;
            connect($s, pack_sockaddr_in(8080, inet_aton(\"127.0.0.1\"))) or die $!;
            push @all, $s;
        }
        open(my $f, \">\", \"$dir/gone\"); close $f; sleep 60'"
        .to_owned()
}

fn services() -> Vec<Ill> {
    let service = tcp("127.0.0.1:8080");
    vec![
        Ill {
            without: vec![service],
            remedy: Remedy::Start(service),
            ..ill("service-down", "local", "the service is stopped", "")
        },
        Ill {
            without: vec![udp("127.0.0.1:5353")],
            remedy: Remedy::Start(udp("127.0.0.1:5353")),
            ..ill("service-down", "local-udp", "the UDP service is stopped", "")
        },
        Ill {
            remedy: Remedy::Advised("nsenter --net=\"$CONTAINER\" iptables -F INPUT"),
            ..ill(
                "target-silent",
                "container",
                "the container drops everything",
                "nsenter --net=\"$CONTAINER\" iptables -A INPUT -p tcp --dport 8080 -j DROP",
            )
        },
        Ill {
            without: vec![service],
            with: vec![tcp("127.0.0.2:8080")],
            ..ill("service-elsewhere", "local", "the service listens at another address", "")
        },
        Ill {
            without: vec![udp("127.0.0.1:5353")],
            with: vec![udp("0.0.0.0:5353")],
            ..ill(
                "wildcard-udp",
                "local-udp",
                "the UDP service is bound to the wildcard address",
                "",
            )
        },
        Ill {
            without: vec![service],
            daemons: vec!["ln -s \"$(command -v perl)\" \"$DIR/docker-proxy\"
                exec \"$DIR/docker-proxy\" -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new(LocalAddr => \"127.0.0.1:8080\", Listen => 9) or die; sleep 60' -- \
                -proto tcp -host-ip 127.0.0.1 -host-port 8080 -container-ip 172.20.0.2 -container-port 8080".to_owned()],
            ..ill(
                "docker-proxy",
                "local",
                "docker-proxy listens on the target's port",
                "tries=0; until ss -Hltnp 'src 127.0.0.1:8080' | grep -q docker; do tries=$((tries + 1)); [ $tries -lt 500 ]; sleep 0.02; done",
            )
        },
    ]
}

fn relays() -> Vec<Ill> {
    let runs = |fault, what: &str, inject: &str| Ill {
        daemons: vec!["exec mmproxyctl run local".to_owned()],
        ..ill(fault, "local", what, &format!("listening 2201; {inject}"))
    };
    // nobody reads at the service, so the proxy is not answered
    const WELL: Remedy = Remedy::Advised("sleep 1.1; proxy 2201 || true");
    vec![
        Ill {
            before: "echo 10.0.0.9 >\"$DIR/etc/allow.txt\"".to_owned(),
            ..runs(
                "proxy-not-allowed",
                "a proxy that is not on the allow list connects",
                "proxy 2201 || true",
            )
        },
        Ill {
            remedy: WELL,
            ..runs(
                "no-header",
                "the proxy sends no PROXY header",
                "echo SSH-2.0-x | proxy 2201 --corrupt missing || true",
            )
        },
        Ill {
            before: "sed -i '/^local\\t/s/$/\\theader-timeout=1s/' \"$DIR/etc/instances.tsv\""
                .to_owned(),
            remedy: WELL,
            ..runs(
                "late-header",
                "the proxy sends the header with the client's first bytes only",
                "nsenter --net=\"$LAN\" sh -c 'sleep 1.5 | nc -q0 10.0.0.2 2201' || true",
            )
        },
        Ill {
            daemons: vec!["echo $$ >\"$DIR/pid\"; exec mmproxyctl run local".to_owned()],
            ..runs(
                "descriptor-limit",
                "the relay may open 256 descriptors",
                "prlimit --pid \"$(cat \"$DIR/pid\")\" --nofile=256:",
            )
        },
    ]
}

fn programs() -> Vec<Ill> {
    vec![
        Ill {
            under: "setpriv --bounding-set -net_admin --inh-caps -net_admin",
            remedy: Remedy::AskAgain,
            ..ill(
                "missing-capability",
                "local",
                "CAP_NET_ADMIN is taken away",
                "",
            )
        },
        Ill {
            under: "strace -qqf -o /dev/null -e trace=setsockopt -e inject=setsockopt:error=ENOPROTOOPT:when=1",
            remedy: Remedy::AskAgain,
            ..ill(
                "kernel-feature-missing",
                "local",
                "the kernel refuses `IP_TRANSPARENT` (strace injects the error)",
                "",
            )
        },
    ]
}
