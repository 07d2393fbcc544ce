// Package qcow2 reads and writes QEMU's qcow2 images, versions 2 and 3.
// Section names in comments are those of QEMU's docs/interop/qcow2.txt.
//
// Design note. The package has two halves. The read side (header, extensions,
// entries, table pages, lookup, packed clusters, snapshots, bitmaps, the host
// walk, create) knows nothing of allocation. The write side (editor, refcount,
// alloc, write, zero, commit) stands on it and is present only in images that
// were opened writable.
//
// Tables are never held whole. L1 and L2 tables are cut into pages of at most
// 4 KiB that live in the layers.Cache, so memory follows the cache's budget
// and not the numbers in an image. A page (tablePage) holds the words of its
// slice in host byte order with every bit preserved, reserved ones included.
// Readers load words atomically and take no lock. The editor pins the pages it
// changes, stores words atomically (that is the moment a change is visible to
// readers of this process) and writes the pages out in the order of its
// commit.
//
// An extended L2 entry is two words that belong together. Each page therefore
// carries a sequence counter: a writer makes it odd, stores both words, makes
// it even again; a reader that saw it odd or changed reads again. No mix of an
// old descriptor with a new bitmap is ever returned, in whichever order they
// were stored. Plain entries are one word and need no counter.
//
// Everything in an image is hostile. Each entry is checked when it is looked
// up (never at open: that would cost time proportional to the image), and
// what is wrong is a *layers.ImageError with the offset of the word, the name
// of the field and the value.
//
// Lock order: that of package layers. The read side has no lock of its own.
package qcow2
