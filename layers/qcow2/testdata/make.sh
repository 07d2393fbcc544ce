#!/bin/sh
# Makes the golden images of this directory with qemu-img and qemu-io 7.2.
# Run it here. What the images hold is written in *.golden by
#     go test -run TestGolden -update
# which has to agree with qemu-img convert and qemu-img map.
set -eu
rm -f ./*.qcow2 ./*.qcow2.gz ./*.data ./*.data.gz

# The clusters of 4 KiB, by number: 0, 1 data; 2 zero; 3 compressed; 4 zero with
# a place; 5 unallocated; 600 data under a second L2 table; the last is cut by
# the size.
small() { # name options commands...
	name=$1 opts=$2
	shift 2
	qemu-img create -q -f qcow2 -o "cluster_size=4k,$opts" "$name.qcow2" 3000320
	qemu-io -f qcow2 -c 'write -q -P 0x11 0 8k' -c 'write -q -P 0x22 16k 4k' \
		-c 'write -q -P 0x33 2400k 1k' -c 'write -q -P 0x44 2999296 1k' "$@" "$name.qcow2"
}
zero='-c "write -q -z 8k 4k" -c "write -q -z 16k 4k"'
packed='-c "write -q -c -P 0x55 12k 4k"'

eval small v3 refcount_bits=16 "$zero" "$packed"
qemu-img bitmap --add -g 64k v3.qcow2 dirty
qemu-img snapshot -c before v3.qcow2
qemu-io -f qcow2 -c 'write -q -P 0x66 0 4k' v3.qcow2

eval small v2 compat=0.10 "$packed"
eval small zstd compression_type=zstd,refcount_bits=1 "$zero" "$packed"
eval small data data_file=data.data "$zero"

qemu-img create -q -f qcow2 -o cluster_size=16k,extended_l2=on extl2.qcow2 1000k
qemu-io -f qcow2 -c 'write -q -P 0x11 512 2k' -c 'write -q -z 4k 3k' \
	-c 'write -q -P 0x22 32k 16k' -c 'write -q -z 36k 1k' -c 'discard -q 48k 512' \
	-c 'write -q -c -P 0x55 64k 16k' -c 'write -q -z 80k 16k' extl2.qcow2

for f in ./*.qcow2 ./*.data; do gzip -9n "$f"; done
