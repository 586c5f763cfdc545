#!/bin/sh
# Builds Kubernetes' own programs from Debian's source package, once, into a cache folder.
#
#   build.sh [FOLDER]      default: $SUPERSERVE_KUBERNETES, else ~/.cache/superserve/kubernetes
#
# What it makes: FOLDER/bin/{kube-apiserver,kube-controller-manager,kube-scheduler,kubelet,kube-proxy}. It needs
# Debian 12 and root for apt-get, some 10 GB of disk, and 10 to 40 minutes on one core. Exit code 3: it cannot be
# built here, and the last line says why. Debian's package is Kubernetes 1.20, the newest that a Debian has.
set -eu

folder=${1:-${SUPERSERVE_KUBERNETES:-${XDG_CACHE_HOME:-$HOME/.cache}/superserve/kubernetes}}
programs="kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy"
packages="golang-go rsync jq dpkg-dev golang-github-modern-go-reflect2-dev etcd-server containerd runc containernetworking-plugins iptables conntrack ethtool socat"

cannot() { echo "kubernetes: skipped: $*" >&2; exit 3; }

whole=yes
for program in $programs; do test -x "$folder/bin/$program" || whole=no; done
test $whole = no || exit 0

test "$(id -u)" = 0 || cannot "apt-get needs root"
command -v apt-get > /dev/null || cannot "needs Debian's apt-get"
grep -q '^VERSION_CODENAME=bookworm' /etc/os-release || cannot "needs Debian 12, whose source package this builds"
mkdir -p "$folder/apt/lists/partial" "$folder/bin"
cd "$folder"
exec 9> "$folder/lock"
flock --nonblock 9 || cannot "another build runs in $folder"

missing=
for package in $packages; do
  dpkg-query --show --showformat '${Status}' "$package" 2> /dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if test -n "$missing"; then
  DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $missing > apt.log 2>&1 \
    || cannot "apt-get could not install$missing: $(tail -n 1 apt.log)"
fi

# The machine's own lists of packages stay as they are: the sources' are fetched into this folder.
sed -n 's/^Types: deb$/Types: deb-src/; /./p; /^$/p' /etc/apt/sources.list.d/debian.sources > apt/sources.sources 2> /dev/null \
  || cannot "found no /etc/apt/sources.list.d/debian.sources to take the mirror from"
sources() {
  apt-get -o Dir::Etc::sourcelist="$folder/apt/sources.sources" -o Dir::Etc::sourceparts="$folder/apt/none" \
    -o Dir::State::Lists="$folder/apt/lists" "$@"
}
if ! test -e kubernetes/.unpacked; then
  rm -rf kubernetes
  { sources update && sources source --download-only kubernetes; } > apt.log 2>&1 \
    || cannot "apt-get could not fetch the source: $(tail -n 1 apt.log)"
  dpkg-source --no-check --extract kubernetes_*.dsc kubernetes > unpack.log 2>&1 \
    || cannot "dpkg-source could not unpack it: $(tail -n 1 unpack.log)"
  # Its own copy of reflect2 does not build with Go 1.18 and newer.
  rm -rf kubernetes/vendor/github.com/modern-go/reflect2
  cp -r /usr/share/gocode/src/github.com/modern-go/reflect2 kubernetes/vendor/github.com/modern-go/reflect2
  touch kubernetes/.unpacked
fi

what=
for program in $programs; do what="$what cmd/$program"; done
# One core, and one package after the other: the machine has other things to do.
cd kubernetes
GOMAXPROCS=${JOBS:-1} GOPROXY=off \
KUBE_GIT_VERSION=v1.20.2 KUBE_GIT_COMMIT=debian KUBE_GIT_TREE_STATE=archive KUBE_GIT_MAJOR=1 KUBE_GIT_MINOR=20 \
  nice -n 10 make WHAT="$what" > "$folder/make.log" 2>&1 || cannot "make failed; see $folder/make.log"
for program in $programs; do cp "_output/bin/$program" "$folder/bin/"; done
cd ..
rm -rf kubernetes kubernetes_*
echo "kubernetes: built into $folder/bin"
