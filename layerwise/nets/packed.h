/* What the products with packed matrices share. A row of x is cut into the groups of the matrix, each in 16-bit fixed
   point. */

#pragma once

#include "native.h"

enum { PIECE = 32, HALF = PIECE / 2, MOST_ROWS = 4, LARGEST_GROUP = 256, CHUNK = 16, TILE = 16 };

typedef struct {
    const int16_t *fixed;    /* [rows, inputs, up to whole pairs of pieces]; nibbles' in the order of `lay_out_nibbles` */
    const float *step, *sum; /* [rows, whole], of every group; zero where there is none */
    int64_t groups, whole;   /* groups in a row, and rounded up to whole chunks */
    int64_t apart;           /* rows of `fixed` */
} Fixed;

/* Puts the numbers of a group, the first of them number `first` of its row, where `outputs_of` reads them for nibbles. */
void lay_out_nibbles(const int16_t *in_order, int64_t first, int64_t group, int16_t *row);

/* Outputs `from` to the one before `to`, TILE at most, of MOST_ROWS rows at most. */
void outputs_of(const Matrix *w, int64_t from, int64_t to, int rows, const Fixed x, float y[TILE][MOST_ROWS]);

/* The numbers of group `g` of output `o`. */
void numbers_of(const Matrix *w, int64_t o, int64_t g, float *to);
