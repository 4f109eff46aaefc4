#!/bin/bash
# The AVX-512 kernels on any x86-64 machine: sanitize/fuzz_c_interface.cpp as the only program of a small Linux in the emulator
# Bochs. The hash of what it writes must be the one that AVX2 gives there. Takes minutes. All it needs in Debian: bochs,
# bochs-term, bochsbios, vgabios, isolinux, syslinux-common, xorriso, cpio, busybox-static, and as a kernel
# linux-image-cloud-amd64. May be given: KERNEL, a bzImage; BOCHS, a build without debugger, several times faster; INPUTS.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
kernel=$(realpath "${KERNEL:-$(printf '%s\n' /boot/vmlinuz-* | tail -1)}")
inputs=${INPUTS:-1000} display=${BOCHS:+nogui}
mkdir -p "$root/build/avx512" && cd "$root/build/avx512"

flags=$(sed -n 's/^FLAGS = \[\(.*\)\]$/\1/p' "$root/setup.py" | tr -d '",')
g++ $flags -fopenmp -static -DSPG_STANDALONE -I"$root/csrc" "$root"/csrc/*.cpp "$root/tests/sanitize/fuzz_c_interface.cpp" -o fuzz \
    -Wl,--whole-archive -lpthread -Wl,--no-whole-archive

rm -rf files disc && mkdir -p files/{bin,dev,proc} disc
cp /bin/busybox fuzz files/bin/
cat > files/init <<END
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
exec > /dev/ttyS0 2>&1
/bin/busybox grep -m 2 -E 'model name|flags' /proc/cpuinfo
for capability in avx512vbmi avx512 avx2; do
  for seed in 1 2 3; do SPG_CPU_CAPABILITY=\$capability /bin/fuzz \$seed $inputs; done
done
/bin/busybox sleep 1
/bin/busybox poweroff -f
END
chmod +x files/init
(cd files && find . | cpio -o -H newc --quiet | gzip) > disc/files.gz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 disc/
cp "$kernel" disc/vmlinuz
# Without XSAVEC, XSAVES and protection keys: Bochs 2.7 has their sizes and places wrong, and Linux then does without AVX.
cat > disc/isolinux.cfg <<END
default linux
label linux
kernel vmlinuz
append initrd=files.gz console=ttyS0 quiet mitigations=off nokaslr tsc=reliable clearcpuid=321,323,515,516
END
xorriso -as mkisofs -quiet -o disc.iso -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table disc

cat > bochsrc <<END
cpu: model=corei3_cnl, ips=50000000, reset_on_triple_fault=0
megs: 512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=guest.txt
display_library: ${display:-term}
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
END
echo continue > commands  # which the debugger in Debian's bochs waits for
rm -f guest.txt
TERM=xterm script -qec "${BOCHS:-bochs -rc commands} -q -f bochsrc" /dev/null < /dev/null > screen.txt || true
cat guest.txt
hashes() { tr -d '\r' < guest.txt | sed -n "s/^$inputs inputs, $1, //p"; }
test "$(hashes avx2 | wc -l)" = 3
diff <(hashes avx2) <(hashes avx512)
diff <(hashes avx2) <(hashes avx512vbmi)
echo "the same bits as with AVX2"
# Outside, AVX2 gives them too, except that Bochs 2.7 rounds ties among float16's subnormals up (3.0 does not).
for seed in 1 2 3; do SPG_CPU_CAPABILITY=avx2 ./fuzz $seed "$inputs"; done
